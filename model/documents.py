"""Which tokens attend to which: documents packed into one row do not see each other.

There are two implementations with the same result: a mask over all pairs of tokens in a row and, on
newer GPUs, a kernel that skips pairs of different documents. Shapes as in model_minimind.py."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_DOCUMENTS = 2**16 - 1  # of attend_within: CUDA's limit on blocks in the grid's second dimension

KERNELS = [  # not cuDNN's: what is left if all else fails should depend on as little as possible
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

_varlen_attn: Callable[..., Any] | None = None  # torch's kernel, imported when it is used


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
        by_bounds: whether to use ``attend_within``, unless it cannot take so many documents."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)  # (1, T)
    if document_starts is None:
        return Visibility(index)
    positions = index - document_starts
    if by_bounds and max_documents is not None and max_documents <= MAX_DOCUMENTS:
        load_varlen_attn()
        bounds = document_bounds(document_starts, max_documents)
        torch._dynamo.maybe_mark_dynamic(bounds, 0)  # one compiled graph for any number of them
        return Visibility(positions, bounds=bounds)
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

    The shape depends on ``max_documents`` only, so that the host does not wait for the device to
    count the documents.

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


def attend_by_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> Tensor:
    """Causal attention among all tokens of a row that ``mask`` allows.

    Args: q: (B, T, H, Dh); k, v: (B, T, K, Dh); mask: see ``document_mask``; dropout_p: the
        probability of dropping an attention weight.
    Returns: (B, T, H, Dh), on a CPU float32 or wider."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    on_cuda = q.device.type == "cuda"
    if on_cuda:  # there, given a mask and fewer key heads, torch would write out all scores
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    elif q.device.type == "cpu":  # where the kernel is faster in float32, see docs/LOG.md
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    with torch.autocast("cpu", enabled=False), sdpa_kernel(KERNELS):
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal=mask is None, enable_gqa=not on_cuda
        )
    return y.transpose(1, 2)


def load_varlen_attn() -> None:
    """Import torch's kernel for ``attend_within``: two seconds, which the CPU is spared."""
    global _varlen_attn
    if _varlen_attn is None:
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 takes fewer key heads without being told, and has no such argument.
        told = "enable_gqa" in inspect.signature(varlen_attn).parameters
        _varlen_attn = partial(varlen_attn, enable_gqa=True) if told else varlen_attn


def attend_within(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Causal attention within each document; pairs of different documents are skipped.

    Args: q: (N, H, Dh); k, v: (N, K, Dh); bounds: see ``document_bounds``; longest: T.
    Returns: (N, H, Dh), perhaps not contiguous."""
    assert _varlen_attn is not None, "load_varlen_attn() comes first"
    return _varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
