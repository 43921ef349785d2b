"""Attention: which tokens see which, where they stand, and by which kernel.

Shapes as in model_minimind.py."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from model.config import MiniMindConfig


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products with ``x`` are done: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 or wider.

    Its output is of the products' type: autocast would cast it anew for each of them."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps)
        return y.to(product_dtype(x))


class ResidualLinear(nn.Linear):
    """Writes into the residual stream, and begins at zero: so each layer begins as the identity.

    docs/RECIPES.md has what that gains. Source: Goyal et al. 2017, 5.1, for residual networks."""


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines, (max_position_embeddings, Dh / 2) float32.

    Each pair of a head turns from one position to the next by theta ** (-2i / Dh) radians. The
    tables follow from the configuration, so no checkpoint holds them and no rank sends them.
    Source: RoFormer (Su et al. 2021), section 3.4.2."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, 1.0 / config.rope_theta ** (pairs / config.head_dim))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B or 1, T) int64 -> cosines and sines, each (B or 1, 1, T, Dh / 2)."""
        return self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + Dh / 2) of x (B, heads, T, Dh) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def document_mask(document_starts: Tensor) -> Tensor:
    """Which tokens each token sees: those of its own document, up to itself.

    Args: document_starts: (B, T) int64, where in the row each token's document begins.
    Returns: (B, 1, T, T) bool, True where the row's token attends to the column's."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    not_later = index[None, None, :] <= index[None, :, None]  # (1, T, T)
    not_before = index[None, None, :] >= document_starts[:, :, None]  # (B, T, T)
    return (not_later & not_before).unsqueeze(1)


def document_bounds(document_starts: Tensor, most: int) -> Tensor:
    """Where each document begins and ends in the batch's tokens, row after row.

    Its shape follows from ``most`` alone, so that compiled code serves every batch and the host
    need not wait to hear how many there are.

    Args:
        document_starts: (B, T) int64, as in ``document_mask``; a stretch of -1 is padding.
        most: at least as many documents and stretches of padding as there are, counted by row.
    Returns: (most + 1,) int32, ascending from 0; what is left over is B * T."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    padding = document_starts < 0
    begins = (document_starts == index) | (padding & ~F.pad(padding[:, :-1], (1, 0)))
    num = begins.numel()
    position = torch.arange(num, device=begins.device)
    found = torch.where(begins.flatten(), position, num).sort().values[:most]
    return F.pad(found, (0, most + 1 - found.numel()), value=num).to(torch.int32)


def attend_within(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Causal attention inside each document; other pairs are never computed.

    Args: q: (N, H, Dh); k, v: (N, K, Dh); bounds: as ``document_bounds``; longest: T.
    Returns: (N, H, Dh)."""
    shared_by = q.shape[1] // k.shape[1]  # torch 2.11 has no enable_gqa here
    k, v = k.repeat_interleave(shared_by, 1), v.repeat_interleave(shared_by, 1)
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))


@functools.cache
def can_attend_within(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this device has that kernel for these sizes, and it gives what the mask gives.

    Tried once, forward and backward: which cards, types and widths it takes differs by release."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    starts = torch.tensor([[0] * 5 + [5] * 11, [0] * 9 + [-1] * 7], device=device)
    generator = torch.Generator(device).manual_seed(0)  # not the run's own
    shape = (3, 2, 16, 2, head_dim)  # q, k, v; B, T, H, Dh
    x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    results = []
    try:
        for masked in (True, False):
            parts = [part.clone().requires_grad_() for part in x]
            if masked:
                q, k, v = (part.float().transpose(1, 2) for part in parts)
                mask = document_mask(starts) | torch.eye(16, dtype=torch.bool, device=device)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
            else:
                flat = [part.flatten(0, 1) for part in parts]
                y = attend_within(*flat, document_bounds(starts, 8), 16).view(shape[1:])
            real = (starts >= 0)[..., None, None]
            (y.float() * real).square().sum().backward()
            results.append([y.float() * real, *(part.grad.float() for part in parts)])
    except RuntimeError:  # no such kernel; a wrong call would be a TypeError, and be seen
        return False
    return all(torch.allclose(a, b, atol=0.1, rtol=0.1) for a, b in zip(*results, strict=True))


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head's queries and keys."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        width, kv_width = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = ResidualLinear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, bounds: Tensor | None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        Args:
            rope: cosines and sines, see ``RotaryEmbedding``.
            mask: as ``document_mask``; None: each token sees all before it.
            bounds: as ``document_bounds``; if given, it takes the place of the mask."""
        by_head = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(by_head)).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_norm(self.k_proj(x).view(by_head)).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if bounds is not None:
            q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
            y = attend_within(q, k, v, bounds, x.shape[1])
            return self.o_proj(y.reshape(*x.shape[:2], -1))  # of one row it may be strided
        if x.device.type == "cpu":  # its kernel is faster in float32, see docs/LOG.md
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None,
                dropout_p=self.dropout if self.training else 0.0, enable_gqa=True
            )
        return self.o_proj(y.to(x.dtype).transpose(1, 2).flatten(2))  # (B, T, D)
