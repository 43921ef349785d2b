"""Training rows: slices of one stream of documents, in an order that can always be recomputed.

An epoch is a stream of all documents in permuted order, each as ``BOS tokens EOS``. Row r is its
slice ``[r * T, (r + 1) * T)``. Only the last row is padded, no document is truncated, and every
token occurs exactly once. Each row tells where its documents begin, so that the model keeps them
apart.

Shapes: B rows in a batch, T tokens in a row, N documents.
"""

import copy
import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from dataset.records import TEXT_COLUMN, DataError
from dataset.token_cache import (
    DEFAULT_CACHE_DIR,
    TokenCache,
    build_token_cache,
    special_ids,
    unsigned,
)

HAN = re.compile("[\u4e00-\u9fff]")  # the common Chinese characters, without punctuation
IGNORE = -100  # a label that carries no loss


class Batch(NamedTuple):
    """Rows in the form in which the model takes them."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, unshifted; IGNORE on a document's first token and on padding
    document_starts: Tensor | None  # (B, T) int64, see MiniMindForCausalLM.forward; None: unpacked
    num_labels: int  # labels that carry loss once shifted, i.e. at t >= 1
    max_documents: int | None = None  # an upper bound, see MiniMindForCausalLM.forward

    @property
    def model_inputs(self) -> dict[str, Tensor | int | None]:
        """The arguments of ``MiniMindForCausalLM.forward``."""
        inputs = self._asdict()
        del inputs["num_labels"]
        return inputs

    def to(self, device: torch.device) -> "Batch":
        """The same rows on another device, without waiting for the copy."""

        def moved(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        starts = None if self.document_starts is None else moved(self.document_starts)
        ids, labels = moved(self.input_ids), moved(self.labels)
        return self._replace(input_ids=ids, labels=labels, document_starts=starts)


def permutation(num: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0 ... num - 1, (num,) int64; a pure function of its arguments."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(num, generator=generator)


class PretrainDataset(Dataset[tuple[Tensor, ...]]):
    """The rows of one epoch: packed, or with ``packing=False`` one document each, truncated and
    padded.

    Memory: 17 bytes per document, about 60 during ``set_epoch``. The tokens stay on disk or, after
    ``to``, on a device, where rows are then made without the host.

    Args:
        data_path: files, see ``find_files``, or an open cache.
        tokenizer: provides the special ids and, unless a cache is given, the token ids.
        max_length: T.
        packing: whether rows are slices of the stream rather than single documents.
        seed: determines the order of documents, together with the epoch.
        heldout_fraction: share of documents, chosen by a hash of their text, for ``held_out``.
        cache_dir, bad_records, text_column: see ``build_token_cache``.
    Raises: DataError as ``build_token_cache``, or if no document is left to train on."""

    def __init__(
        self,
        data_path: str | list[str] | TokenCache,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        *,
        packing: bool = True,
        seed: int = 42,
        heldout_fraction: float = 0.0,
        cache_dir: str = DEFAULT_CACHE_DIR,
        bad_records: str = "stop",
        text_column: str = TEXT_COLUMN,
    ) -> None:
        self.cache = (
            data_path
            if isinstance(data_path, TokenCache)
            else build_token_cache(data_path, tokenizer, cache_dir, bad_records, text_column)
        )
        self.bos, self.eos, self.pad = special_ids(tokenizer)
        self.row_length, self.stride = max_length, max_length
        self.packing, self.seed = packing, seed
        # Hashes are uniform int32, so this share of their range is the same share of documents.
        # It does not depend on the other documents: as the corpus grows, each stays on its side.
        limit = min(round(heldout_fraction * 2**32) - 2**31, 2**31 - 1)  # int32's largest
        self.is_held_out = self.cache.hashes < limit  # (N,) bool
        self.documents = torch.where(~self.is_held_out)[0].to(torch.int32)
        if len(self.documents) == 0:
            raise DataError(
                f"all {len(self.is_held_out)} documents are held out. "
                f"Lower --heldout_fraction (now {heldout_fraction}), or add documents."
            )
        self.set_epoch(0)

    @property
    def _corpus(self) -> tuple[Tensor, Tensor]:
        """Tokens and offsets. As attributes they would be copied into each loader process."""
        return (self.cache.moved or (self.cache.tokens, self.cache.offsets))[:2]

    @property
    def was_moved(self) -> bool:
        """Whether rows are made on a device other than the host."""
        return self.cache.moved is not None

    @property
    def num_bytes_in_use(self) -> int:
        """Bytes that ``to`` takes on a device: the tokens, and where each document begins."""
        return self.cache.tokens.nbytes + self.cache.offsets.nbytes + 12 * len(self.documents)

    def to(self, device: torch.device) -> "PretrainDataset":
        """Move the corpus to a device, for all datasets that share the cache; or back to the host,
        where it stays on disk."""
        self.cache.moved = None
        if device.type != "cpu":
            tokens, offsets = self._corpus
            mask = None if self.cache.mask is None else self.cache.mask.to(device)
            self.cache.moved = tokens.to(device), offsets.to(device), mask
        return self

    def set_epoch(self, epoch: int) -> None:
        """Put the documents into the order of this epoch."""
        self._lay_out(self.documents[permutation(len(self.documents), self.seed, epoch)])

    def _lay_out(self, order: Tensor) -> None:
        """Line up these documents, (N,) int32, as the stream."""
        self.order = order
        lengths = self._lengths(order) + 2  # BOS and EOS
        self.begins = torch.zeros(len(order) + 1, dtype=torch.int64)  # in the stream
        torch.cumsum(lengths, 0, out=self.begins[1:])
        self._layout = self.order, self.begins

    def _lengths(self, documents: Tensor) -> Tensor:
        """Tokens of each of these in the cache, (N,) int64."""
        return self.cache.offsets[documents + 1] - self.cache.offsets[documents]

    def held_out(self, max_tokens: int) -> "PretrainDataset | None":
        """The first held-out documents, up to ``max_tokens`` but at least one, for evaluation; None
        if no document is held out."""
        documents = torch.where(self.is_held_out)[0].to(torch.int32)
        if len(documents) == 0:
            return None
        ends = (self._lengths(documents) + 2).cumsum(0)
        num_kept = max(1, int(torch.searchsorted(ends, max_tokens, right=True)))
        return self.for_evaluation(documents[:num_kept])

    def for_evaluation(self, documents: Tensor | None = None) -> "PretrainDataset":
        """Packed rows of these documents, (N,) int32 (default: those of this dataset), in order.

        Rows overlap by one token, so that every token except each document's first is predicted
        exactly once: the summed loss is that of all bytes of these documents."""
        other = copy.copy(self)  # of a subclass, too, whose rows may have labels of their own
        other.documents = self.documents if documents is None else documents
        other.packing, other.stride = True, self.row_length - 1
        other._lay_out(other.documents)
        return other

    def by_language(self, tokenizer: PreTrainedTokenizerBase) -> "dict[str, PretrainDataset]":
        """These documents for evaluation: ``zh``, at least a tenth of whose characters are Chinese,
        as text may include code and names, and all others, ``en``. Empty parts are omitted."""
        is_chinese = torch.zeros(len(self.documents), dtype=torch.bool)
        for i, document in enumerate(self.documents.tolist()):
            text = self.cache.text(document, tokenizer)
            is_chinese[i] = len(HAN.findall(text)) >= 0.1 * len(text)
        parts = {"zh": self.documents[is_chinese], "en": self.documents[~is_chinese]}
        return {name: self.for_evaluation(part) for name, part in parts.items() if len(part)}

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, with BOS and EOS."""
        return int(self.begins[-1])

    @property
    def num_text_bytes(self) -> int:
        """UTF-8 bytes of the documents' texts."""
        return int(self.cache.num_bytes[self.documents].sum())

    def documents_of(self, rows: Iterable[int]) -> list[int]:
        """The documents that have a token in these rows: sorted numbers, from 0, in the corpus."""
        row = nth = torch.tensor(list(rows))
        if self.packing:
            position = row[:, None] * self.stride + torch.arange(self.row_length)  # (B, T)
            nth = torch.searchsorted(self.begins, position, right=True) - 1
        return self.order[nth[nth < len(self.order)]].unique().tolist()

    def __len__(self) -> int:
        """Rows of an epoch, the same in every epoch."""
        if not self.packing:
            return len(self.order)
        overlap = self.row_length - self.stride
        return -(-(self.num_tokens - overlap) // self.stride)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One row: input_ids and labels, (T,) int64, and if it is packed document_starts (T,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return tuple(part[0] for part in self.__getitems__([index])[:3] if part is not None)

    def __getitems__(self, rows: list[int]) -> Batch:
        """These B rows, made at once. Rows beyond the last are padding, so that every batch can be
        full."""
        tokens, offsets = self._corpus
        if self._layout[0].device != tokens.device:  # ``to`` was called since
            self._layout = self.order.to(tokens.device), self.begins.to(tokens.device)
        order, begins = self._layout
        row = torch.as_tensor(rows).to(tokens.device, non_blocking=True)[:, None]  # (B, 1)
        t = torch.arange(self.row_length, device=tokens.device)  # (T,)
        last = len(order) - 1
        if self.packing:  # position in the stream and nth document in it, both (B, T)
            position = row * self.stride + t
            nth = torch.searchsorted(begins, position, right=True) - 1
            is_real = nth <= last
            nth = nth.clamp(max=last)
        else:
            nth = row.clamp(max=last).expand(-1, len(t))
            position = begins[nth] + t
            is_real = (row <= last) & (position < begins[nth + 1])
        within = position - begins[nth]  # index in ``BOS tokens EOS``
        is_bos, is_eos = within == 0, position == begins[nth + 1] - 1
        is_text = is_real & ~is_bos & ~is_eos
        source = offsets[order[nth]] + within - 1
        ids = unsigned(tokens[torch.where(is_text, source, 0)])
        ids = ids.masked_fill_(is_bos, self.bos).masked_fill_(is_eos, self.eos)
        ids = ids.masked_fill_(~is_real, self.pad)
        labels = ids.masked_fill(is_bos | ~is_real, IGNORE)
        starts = (t - within.clamp(max=t)).masked_fill_(~is_real, -1) if self.packing else None
        return Batch(ids, labels, starts, *self._counts(rows))

    def _counts(self, rows: list[int]) -> tuple[int, int | None]:
        """``num_labels`` and ``max_documents`` of a Batch of these rows.

        They are computed on the host from ``begins``, so that nothing waits for a device."""
        row = torch.as_tensor(rows)
        if not self.packing:
            nth = row[row < len(self.order)]
            lengths = self.begins[nth + 1] - self.begins[nth]
            return int((lengths.clamp(max=self.row_length) - 1).sum()), None
        second = (row * self.stride + 1).clamp(max=self.num_tokens)  # labels count at t >= 1
        end = (row * self.stride + self.row_length).clamp(max=self.num_tokens)
        firsts = torch.searchsorted(self.begins, end) - torch.searchsorted(self.begins, second)
        most = len(rows) + int(firsts.sum()) + 1  # each row begins with one; and padding
        return int((end - second - firsts).sum()), most


class SkipBatchSampler(Sampler[list[int]]):
    """Consecutive batches of a sampler's rows, dealt to ranks in turn.

    Args:
        sampler: row numbers in order.
        batch_size: rows per batch, B; the last batch may be smaller.
        skip_batches: batches to leave out at the beginning, counted over all ranks."""

    def __init__(
        self,
        sampler: Collection[int],
        batch_size: int,
        skip_batches: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.skip_batches = skip_batches
        self.rank, self.world_size = rank, world_size

    def _all_batches(self) -> Iterator[list[int]]:
        rows = itertools.islice(self.sampler, self.skip_batches * self.batch_size, None)
        while batch := list(itertools.islice(rows, self.batch_size)):
            yield batch

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._all_batches(), self.rank, None, self.world_size)

    def __len__(self) -> int:
        left = max(0, -(-len(self.sampler) // self.batch_size) - self.skip_batches)
        return len(range(self.rank, left, self.world_size))


def __getattr__(name: str) -> type:
    """MiniMind has these here, too. They are built on this file, so it cannot import them first."""
    if name not in ("SFTDataset", "DPODataset"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dataset import chat_datasets

    return getattr(chat_datasets, name)
