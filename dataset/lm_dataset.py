"""Rows to train on: slices of one long stream of documents, in an order that anyone can recompute.

An epoch is a stream: all documents in a permuted order, each ``BOS tokens EOS``. Row r is its slice
``[r * T, (r + 1) * T)``. Nothing is padded but the last row, nothing is cut off, and every token
comes once. Each row says where its documents begin, so that the model keeps them apart.
"""

import hashlib
import itertools
import multiprocessing
import re
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from dataset.records import DataError
from dataset.token_cache import (
    DEFAULT_CACHE_DIR, TokenCache, build_token_cache, special_ids, unsigned
)

CHINESE = re.compile("[\u4e00-\u9fff]")
IGNORE = -100  # a label that carries no loss


class Batch(NamedTuple):
    """Rows as the model takes them."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, unshifted; IGNORE on a document's first token and on padding
    document_starts: (
        Tensor | None
    )  # (B, T) int64, see MiniMindForCausalLM.forward; None if not packed
    num_labels: int  # labels that carry loss once shifted: those at t >= 1
    max_documents: int | None = None  # a power of two, see MiniMindForCausalLM.forward

    def to(self, device: torch.device) -> "Batch":
        """The same rows on another device, without waiting for the copy."""
        move = [part.to(device, non_blocking=True) for part in self[:3] if part is not None]
        return Batch(*move, *[None] * (3 - len(move)), *self[3:])


def as_is(batch: Batch) -> Batch:
    """For DataLoader(collate_fn=...): ``PretrainDataset.__getitems__`` has collated already."""
    return batch


def ignore_signals(worker: int) -> None:
    """For DataLoader(worker_init_fn=...): a signal to the whole group is the trainer's to answer.

    It would end the loader's processes first, and the trainer with them, unsaved."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def from_loader(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches. Raises: DataError if a loader process died or gives no sign of life."""
    try:
        iterator = iter(batches)
        if getattr(batches, "num_workers", 0):  # torch's handler raises wherever the program is,
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # in a save, too; the loader looks itself
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError) as error:
        lost = isinstance(error, ConnectionError | EOFError)  # while a batch was being handed over
        if not lost and not str(error).startswith("DataLoader"):
            raise
        for process in multiprocessing.active_children():
            process.kill()  # stuck ones do not hear a gentler signal, and would be waited for
        reason = "DataLoader: a worker is gone" if lost else str(error).splitlines()[0].rstrip()
        raise DataError(
            f"{reason.removesuffix('.')}. Often memory ran out: try a lower --num_workers."
        ) from None


def permutation(num: int, seed: int, epoch: int) -> Tensor:
    """(num,) int64, a pure function of its arguments."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(num, generator=generator)


class PretrainDataset(Dataset):
    """Packed rows of one epoch, or with ``packing=False`` one document each, cut and padded.

    Memory: 17 bytes a document, about 60 while ``set_epoch`` orders them; the tokens stay on disk,
    or after ``to`` on a device, where rows are then made without this processor.

    Args:
        data_path: a file, several, a folder or pattern, or a cache opened before.
        tokenizer: gives the ids and, with data_path, the cache's content.
        max_length: T, tokens in a row.
        packing: slices of the stream (True) or one document a row (False).
        seed: with the epoch, decides the order of documents.
        heldout_fraction: share of documents, by hash of their text, that is kept for ``held_out``.
    Raises: DataError as ``build_token_cache``, or if nothing is left to train on."""

    def __init__(
        self, data_path: str | list[str] | TokenCache, tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512, *, packing: bool = True, seed: int = 42,
        heldout_fraction: float = 0.0, cache_dir: str = DEFAULT_CACHE_DIR,
        bad_records: str = "stop", text_column: str = "text"
    ) -> None:
        given = isinstance(data_path, TokenCache)
        self.cache = data_path if given else build_token_cache(
            data_path, tokenizer, cache_dir, bad_records, text_column
        )
        self.bos, self.eos, self.pad = special_ids(tokenizer)
        self.row_length, self.stride = max_length, max_length
        self.packing, self.seed = packing, seed
        self._moved: tuple[Tensor, Tensor] | None = None  # tokens and offsets, by ``to``
        # The hash is uniform, so a share of its range is the same share of documents, whichever
        # others there are: a document stays on its side when the corpus grows.
        limit = round(heldout_fraction * 2**32) - 2**31
        self.is_held_out = self.cache.hashes < limit  # (num_documents,) bool
        self.documents = torch.where(~self.is_held_out)[0].to(torch.int32)
        if len(self.documents) == 0:
            raise DataError(
                f"all {len(self.is_held_out)} documents fell to the held-out part. "
                f"Lower --heldout_fraction (now {heldout_fraction}), or add documents."
            )
        self.set_epoch(0)

    @property
    def _corpus(self) -> tuple[Tensor, Tensor]:
        """Tokens and offsets; not attributes, for loader processes would get a copy of them."""
        return self._moved or (self.cache.tokens, self.cache.offsets)

    @property
    def was_moved(self) -> bool:
        """Whether rows are made on another device than the host."""
        return self._moved is not None

    @property
    def num_bytes_in_use(self) -> int:
        """Memory that ``to`` takes on the device: tokens, and where each document begins."""
        return self.cache.tokens.nbytes + self.cache.offsets.nbytes + 12 * len(self.documents)

    def to(self, device: torch.device) -> "PretrainDataset":
        """Keep the corpus on the device from now on, also for what ``held_out`` gives later."""
        tokens, offsets = self._corpus
        self._moved = tokens.to(device), offsets.to(device)
        self._lay_out(self.order)
        return self

    def set_epoch(self, epoch: int) -> None:
        """Put the documents into this epoch's order."""
        self._lay_out(self.documents[permutation(len(self.documents), self.seed, epoch)])

    def _lay_out(self, order: Tensor) -> None:
        """Set the stream: ``order`` (num,) int32 document numbers, and where each begins in it."""
        self.order = order
        lengths = self.cache.offsets[order + 1] - self.cache.offsets[order] + 2  # BOS and EOS
        self.begins = torch.zeros(len(order) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=self.begins[1:])
        device = self._corpus[0].device
        self._layout = self.order.to(device), self.begins.to(device)

    def held_out(self, max_tokens: int) -> "PretrainDataset | None":
        """Those documents kept aside that fit ``max_tokens``, for evaluation; None if none."""
        documents = torch.where(self.is_held_out)[0].to(torch.int32)
        if len(documents) == 0:
            return None
        kept = self.for_evaluation(documents)
        num_kept = max(1, int(torch.searchsorted(kept.begins, max_tokens, right=True)) - 1)
        return self.for_evaluation(documents[:num_kept])

    def for_evaluation(self, documents: Tensor | None = None) -> "PretrainDataset":
        """Rows of these documents (by number; default all of this set), in the files' order.

        They overlap by one token, so that every token but a document's first is predicted exactly
        once: the summed loss belongs to all bytes of these documents."""
        other = object.__new__(type(self))  # with the labels of a class of one's own
        other.__dict__ |= self.__dict__
        other.documents = self.documents if documents is None else documents
        other.packing, other.stride = True, self.row_length - 1
        other._lay_out(other.documents)
        return other

    def by_language(self, tokenizer: PreTrainedTokenizerBase) -> "dict[str, PretrainDataset]":
        """These documents for evaluation, Chinese ones apart: ``zh``, and all others as ``en``.

        A document is Chinese if a tenth of its characters are; code and names are among them."""
        chinese = []
        for document in self.documents.tolist():
            text = tokenizer.decode(self.cache.ids(document))
            chinese.append(len(CHINESE.findall(text)) >= 0.1 * len(text))
        is_chinese = torch.tensor(chinese, dtype=torch.bool)
        parts = {"zh": self.documents[is_chinese], "en": self.documents[~is_chinese]}
        return {name: self.for_evaluation(part) for name, part in parts.items() if len(part)}

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, BOS and EOS included."""
        return int(self.begins[-1])

    @property
    def num_text_bytes(self) -> int:
        """UTF-8 bytes of these documents' texts."""
        return int(self.cache.num_bytes[self.documents].sum())

    def documents_of(self, rows: Iterable[int]) -> list[int]:
        """The documents that have a token in these rows, by number in the corpus from 0, sorted."""
        position = torch.tensor(list(rows))[:, None] * self.stride + torch.arange(self.row_length)
        nth = torch.searchsorted(self.begins, position, right=True) - 1
        if not self.packing:
            nth = torch.tensor(list(rows))
        return self.order[nth[nth < len(self.order)]].unique().tolist()

    def __len__(self) -> int:
        """Rows of an epoch: the same every epoch."""
        if not self.packing:
            return len(self.order)
        overlap = self.row_length - self.stride
        return -(-(self.num_tokens - overlap) // self.stride)

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        """(input_ids, labels), each (T,) int64, and for packed rows document_starts (T,)."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return tuple(part[0] for part in self.__getitems__([row])[:3] if part is not None)

    def __getitems__(self, rows: list[int]) -> Batch:
        """The given rows at once. Rows past the last are padding, so that batches can be full."""
        (tokens, offsets), (order, begins) = self._corpus, self._layout
        row = torch.as_tensor(rows).to(tokens.device, non_blocking=True)[:, None]  # (B, 1)
        t = torch.arange(self.row_length, device=tokens.device)  # (T,)
        last = len(order) - 1
        if self.packing:
            position = row * self.stride + t  # in the stream
            nth = torch.searchsorted(begins, position, right=True) - 1
            real = nth <= last
            nth = nth.clamp(max=last)
        else:
            nth = row.clamp(max=last).expand(-1, len(t))
            position = begins[nth] + t
            real = (row <= last) & (position < begins[nth + 1])
        within = position - begins[nth]  # index in ``BOS tokens EOS``
        is_bos, is_eos = within == 0, position == begins[nth + 1] - 1
        is_text = real & ~is_bos & ~is_eos
        source = offsets[order[nth]] + within - 1
        ids = unsigned(tokens[torch.where(is_text, source, 0)])
        ids = ids.masked_fill_(is_bos, self.bos).masked_fill_(is_eos, self.eos)
        ids = ids.masked_fill_(~real, self.pad)
        labels = ids.masked_fill(is_bos | ~real, IGNORE)
        starts = (t - within.clamp(max=t)).masked_fill_(~real, -1) if self.packing else None
        return Batch(ids, labels, starts, *self._counts(rows))

    def _counts(self, rows: list[int]) -> tuple[int, int | None]:
        """Labels of these rows that carry loss: all tokens but rows' first and documents' first;
        and for packed rows a power of two, not below the number of documents and of padding.

        Counted from where documents begin, so that nobody waits for a device."""
        row = torch.as_tensor(rows)
        if not self.packing:
            nth = row[row < len(self.order)]
            lengths = self.begins[nth + 1] - self.begins[nth]
            return int((lengths.clamp(max=self.row_length) - 1).sum()), None
        second = (row * self.stride + 1).clamp(max=self.num_tokens)
        end = (row * self.stride + self.row_length).clamp(max=self.num_tokens)
        firsts = torch.searchsorted(self.begins, end) - torch.searchsorted(self.begins, second)
        most = len(rows) + int(firsts.sum()) + 1  # each row begins one, and one row may end early
        return int((end - second - firsts).sum()), 2 ** (most - 1).bit_length()


class SkipBatchSampler(Sampler[list[int]]):
    """Consecutive batches of ``sampler``, from ``skip_batches`` on, dealt to ranks in turn."""

    def __init__(
        self, sampler: Iterable[int], batch_size: int, skip_batches: int = 0, *, rank: int = 0,
        world_size: int = 1
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.skip_batches = skip_batches
        self.rank, self.world_size = rank, world_size

    def _all_batches(self) -> Iterator[list[int]]:
        items = itertools.islice(self.sampler, self.skip_batches * self.batch_size, None)
        while batch := list(itertools.islice(items, self.batch_size)):
            yield batch

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._all_batches(), self.rank, None, self.world_size)

    def __len__(self) -> int:
        left = max(0, -(-len(self.sampler) // self.batch_size) - self.skip_batches)
        return len(range(self.rank, left, self.world_size))
