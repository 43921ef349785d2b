"""Which tokens see which: documents packed into one row stay apart.

Two ways that give the same result: a mask over all pairs of a row's tokens, and on newer cards a
kernel that never computes pairs of different documents. Shapes as in model_minimind.py."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class Visibility(NamedTuple):
    """Where the tokens of a batch stand, and which of them each one attends to."""

    positions: Tensor  # (B or 1, T) int64, counted from the document's first token
    mask: Tensor | None = None  # see document_mask; None: all tokens before it in the row
    bounds: Tensor | None = None  # see document_bounds; if given, it takes the place of the mask


def visibility(
    input_ids: Tensor, document_starts: Tensor | None, max_documents: int | None,
    by_bounds: bool
) -> Visibility:
    """What attention needs to know of a batch.

    Args:
        input_ids: (B, T) int64.
        document_starts: (B, T) int64, as in ``document_mask``; None: each row is one document.
        max_documents: as in ``document_bounds``.
        by_bounds: whether the device attends within bounds, see ``can_attend_within``."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)  # (1, T)
    if document_starts is None:
        return Visibility(index)
    positions = index - document_starts
    if by_bounds and max_documents is not None:
        return Visibility(positions, bounds=document_bounds(document_starts, max_documents))
    return Visibility(positions, mask=document_mask(document_starts))


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
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out


@functools.cache
def can_attend_within(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this device has that kernel for these sizes, and it gives what the mask gives.

    Tried once, forward and backward: which cards, types and widths it takes differs by release."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    starts = torch.tensor([[0] * 5 + [5] * 11, [0] * 9 + [-1] * 7], device=device)
    generator = torch.Generator(device).manual_seed(0)  # not the run's own
    shape = (3, 2, 16, 2, head_dim)  # q, k, v; B, T, H, Dh
    qkv = torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
    real = (starts >= 0)[..., None, None]  # (B, T, 1, 1)
    results = []
    try:
        for masked in (True, False):
            if masked:
                q, k, v = qkv.float().transpose(2, 3)
                mask = document_mask(starts) | torch.eye(16, dtype=torch.bool, device=device)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
            else:
                q, k, v = qkv.flatten(1, 2)
                y = attend_within(q, k, v, document_bounds(starts, 8), 16).view(shape[1:])
            y = y.float() * real
            (gradient,) = torch.autograd.grad(y.square().sum(), qkv)
            results.append((y, gradient.float()))
    except RuntimeError:  # no such kernel; a wrong call would be a TypeError, and be seen
        return False
    return all(torch.allclose(a, b, atol=0.1, rtol=0.1) for a, b in zip(*results, strict=True))
