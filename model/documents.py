"""Which tokens attend to which: documents packed into one row do not see each other.

There are two implementations with the same result: a mask over all pairs of tokens in a row and, on
newer GPUs, a kernel that skips pairs of different documents. Shapes as in model_minimind.py."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Visibility(NamedTuple):
    """The position of each token in its document, and which tokens it attends to."""

    positions: Tensor  # (B or 1, T) int64, from 0 at the document's first token
    mask: Tensor | None = None  # (B, 1, T, T), see document_mask; None: causal over the whole row
    bounds: Tensor | None = None  # see document_bounds; used instead of a mask if given


def visibility(
    input_ids: Tensor, document_starts: Tensor | None, max_documents: int | None, by_bounds: bool
) -> Visibility:
    """What attention needs to know about a batch.

    Args:
        input_ids: (B, T) int64.
        document_starts: (B, T) int64, as in ``document_mask``; None: each row is one document.
        max_documents: as in ``document_bounds``.
        by_bounds: whether to use ``attend_within``, see ``can_attend_within``."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)  # (1, T)
    if document_starts is None:
        return Visibility(index)
    positions = index - document_starts
    if by_bounds and max_documents is not None:
        return Visibility(positions, bounds=document_bounds(document_starts, max_documents))
    return Visibility(positions, mask=document_mask(document_starts))


def document_mask(document_starts: Tensor) -> Tensor:
    """Causal attention mask within documents.

    Args: document_starts: (B, T) int64, the index in the row at which each token's document begins.
    Returns: (B, 1, T, T) bool, True where the query (dim 2) attends to the key (dim 3)."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    not_later = index[None, None, :] <= index[None, :, None]  # (1, T, T)
    not_before = index[None, None, :] >= document_starts[:, :, None]  # (B, T, T)
    return (not_later & not_before).unsqueeze(1)


def document_bounds(document_starts: Tensor, max_documents: int) -> Tensor:
    """The boundaries between documents among the N tokens of a batch, row after row.

    The shape depends on ``max_documents`` only. So one compiled graph serves every batch, and the
    host does not wait for the device to count the documents.

    Args:
        document_starts: (B, T) int64, as in ``document_mask``; -1 on padding.
        max_documents: an upper bound on the number of documents and runs of padding, where one that
            continues in the next row counts in both.
    Returns: (max_documents + 1,) int32, ascending from 0; unused entries are N."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    padding = document_starts < 0
    begins = (document_starts == index) | (padding & ~F.pad(padding[:, :-1], (1, 0)))  # (B, T)
    num_tokens = begins.numel()
    position = torch.arange(num_tokens, device=begins.device)
    bounds = torch.where(begins.flatten(), position, num_tokens).sort().values[:max_documents]
    unused = max_documents + 1 - bounds.numel()
    return F.pad(bounds, (0, unused), value=num_tokens).to(torch.int32)


def attend_within(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Causal attention within each document; pairs of different documents are skipped.

    Args: q: (N, H, Dh); k, v: (N, K, Dh); bounds: see ``document_bounds``; longest: T.
    Returns: (N, H, Dh)."""
    from torch.nn.attention.varlen import varlen_attn  # two seconds, which the CPU is spared

    shared_by = q.shape[1] // k.shape[1]  # in torch 2.11, varlen_attn has no enable_gqa
    k, v = k.repeat_interleave(shared_by, 1), v.repeat_interleave(shared_by, 1)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out


@functools.cache
def can_attend_within(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``attend_within`` works on this device and gives the same result as the mask.

    It is tried on a small batch, forward and backward, because the GPUs, dtypes and head sizes that
    the kernel supports differ between releases of torch."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    starts = torch.tensor([[0] * 5 + [5] * 11, [0] * 9 + [-1] * 7], device=device)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global one alone
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
    except RuntimeError:  # no such kernel; a wrong call raises TypeError, which is not caught
        return False
    return all(torch.allclose(a, b, atol=0.1, rtol=0.1) for a, b in zip(*results, strict=True))
