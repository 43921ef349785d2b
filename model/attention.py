"""Attention: which tokens see which, where they stand, and by which kernel.

Shapes as in model_minimind.py."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import DynamicCache

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


def inverse_frequencies(config: MiniMindConfig) -> Tensor:
    """Radians by which each pair of a head turns from one position to the next.

    With ``inference_rope_scaling`` slow pairs are stretched to 16 times 2,048 positions (YaRN).

    Returns: (Dh / 2,) float32.
    Source: RoFormer (Su et al. 2021), section 3.4.2; YaRN (Peng et al. 2023), section 3.2."""
    dim, base = config.head_dim, config.rope_theta
    plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if not config.inference_rope_scaling:
        return plain

    trained_positions, stretch, fast_turns, slow_turns = 2048, 16, 32, 1

    def pair_that_turns(turns: int) -> float:
        return dim * math.log(trained_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(fast_turns)), 0)
    high = min(math.ceil(pair_that_turns(slow_turns)), dim // 2 - 1)
    stretched_share = ((torch.arange(dim // 2, device="cpu") - low) / max(high - low, 0.001)).clamp(
        0, 1
    )
    return plain * (1 - stretched_share) + plain / stretch * stretched_share


class ResidualLinear(nn.Linear):
    """Writes into the residual stream, and begins at zero: so each layer begins as the identity.

    docs/RECIPES.md has what that gains. Source: Goyal et al. 2017, 5.1, for residual networks."""


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines, (max_position_embeddings, Dh / 2) float32.

    They follow from the configuration, so no checkpoint holds them and no rank sends them."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_position_embeddings, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)
        self.fill_tables()

    @torch.no_grad()
    def fill_tables(self) -> None:
        """Compute both tables, again when transformers built the model on the meta device."""
        positions = torch.arange(
            self.config.max_position_embeddings, dtype=torch.float32, device="cpu"
        )
        angles = torch.outer(positions, inverse_frequencies(self.config))
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

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


def cache_mask(
    num_new: int, num_past: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which cached and new tokens each new token sees during generation.

    Args: attention_mask: (B, past + new), 0 on padding, or None.
    Returns: (B or 1, 1, new, past + new) bool, or None where plain causality says it all."""
    if attention_mask is None and (num_past == 0 or num_new == 1):
        return None
    keys = torch.arange(num_past + num_new, device=device)
    queries = keys[num_past:, None]
    mask = (keys <= queries)[None, None]
    if attention_mask is not None:
        # Padding sees itself: a softmax over nothing is NaN, and NaN spreads even at weight zero.
        mask = (mask & attention_mask[:, None, None, :].bool()) | (keys == queries)
    return mask


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head's queries and keys."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
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
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
        cache: DynamicCache | None, bounds: Tensor | None = None
    ) -> Tensor:
        by_head = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(by_head)).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_norm(self.k_proj(x).view(by_head)).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if bounds is not None:
            q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
            return self.o_proj(attend_within(q, k, v, bounds, x.shape[1]).view(*x.shape[:2], -1))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if x.device.type == "cpu":  # its kernel is faster in float32, see docs/LOG.md
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                dropout_p=self.dropout if self.training else 0.0, enable_gqa=True
            )
        return self.o_proj(y.to(x.dtype).transpose(1, 2).flatten(2))  # (B, T, D)
