"""Training rows for conversations: as dataset/lm_dataset.py makes them for texts.

Shapes: B rows in a batch, T tokens in a row, R rows in an epoch, N documents.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.conversations import chat_content
from dataset.lm_dataset import IGNORE, Batch, PretrainDataset, SkipBatchSampler, permutation
from dataset.packing import OPEN_ROWS, Pieces, pack
from dataset.preferences import pair_content
from dataset.records import Content, DataError
from dataset.system_lines import SystemLines
from dataset.token_cache import DEFAULT_CACHE_DIR, TokenCache, build_token_cache, unsigned


class Places(NamedTuple):
    """Where the pieces of this epoch are, on the device that makes rows. P: pieces, L: lines."""

    source: Tensor  # (P,) int64, the first token in the cache
    length: Tensor  # (P,) int64, tokens, with those of a system line
    begins: Tensor  # (P,) int64, see Pieces
    row_order: Tensor  # (R,) int64
    before: Tensor  # (P,) int64, tokens of the system line before it
    line: Tensor  # (P,) int64, which one
    lines: Tensor  # (L, longest) int64, see SystemLines


class SFTDataset(PretrainDataset):
    """Conversations, whole where they fit into a row; what the assistant says carries the loss.

    How they share rows depends on the seed alone, the order of rows also on the epoch.

    Args: as PretrainDataset; ``data_path`` holds conversations, see dataset/conversations.py, and
        without ``packing``, each begins a row of its own.
        system_share: share of the conversations without a system turn that get one in an epoch, see
            dataset/system_lines.py.
        content_choice: see ``chat_content``; of a cache that is to be built.
    Raises: DataError, also if there is no conversation."""

    pieces: Pieces
    row_order: Tensor  # (R,) int64, in this epoch
    places: Places
    has_room: Tensor  # (P,) bool, before which pieces a system line has room

    content: Callable[..., Content] = staticmethod(chat_content)  # what a record holds

    def __init__(
        self,
        data_path: str | list[str] | TokenCache,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 768,
        *,
        packing: bool = True,
        seed: int = 42,
        heldout_fraction: float = 0.0,
        cache_dir: str = DEFAULT_CACHE_DIR,
        bad_records: str = "stop",
        system_share: float = 0.0,
        **content_choice: float,
    ) -> None:
        if not isinstance(data_path, TokenCache):
            content = self.content(tokenizer, **content_choice)
            data_path = build_token_cache(
                data_path, tokenizer, cache_dir, bad_records, content=content
            )
        if data_path.meta.get("num_texts") == data_path.meta["num_documents"]:
            raise DataError(
                "no conversation in --data_path, only texts: train_pretrain.py learns from those."
            )
        self.share_rows, self.system_share = packing, system_share
        self.lines = SystemLines.written(tokenizer) if system_share else None
        choice = {"seed": seed, "heldout_fraction": heldout_fraction}
        super().__init__(data_path, tokenizer, max_length, **choice)

    def set_epoch(self, epoch: int) -> None:
        """Put the rows into the order of this epoch."""
        if not hasattr(self, "pieces"):
            self._lay_out(self.documents[permutation(len(self.documents), self.seed, -1)])
        self.row_order = permutation(len(self), self.seed, epoch)
        length, before, line = self.pieces.length, torch.zeros_like(self.pieces.length), None
        if self.lines:
            hashes = self.cache.hashes[self.order[self.pieces.document]]
            drawn = self.lines.drawn(hashes, self.system_share, self.seed, epoch)
            line = torch.where(self.has_room, drawn, -1)
            before = torch.where(line >= 0, self.lines.lengths[line], 0)
            length = length - self.lines.ids.shape[1] * self.has_room + before
        self._place(length, before, line)

    def _place(self, length: Tensor, before: Tensor, line: Tensor | None = None) -> None:
        """Set ``places``; see there."""
        documents = self.order[self.pieces.document].to(torch.int64)
        source = self.cache.offsets[documents] + self.pieces.first
        lines = self.lines.ids if self.lines else torch.zeros(1, 1, dtype=torch.int64)
        line = torch.full_like(before, -1) if line is None else line
        order = self.row_order
        self.places = Places(source, length, self.pieces.begins, order, before, line, lines)

    def _lay_out(self, order: Tensor) -> None:
        """Pack these documents, (N,) int32, into rows."""
        self.order = order
        self.pieces = pieces = self._pack(OPEN_ROWS if self.share_rows else 0)
        self.row_order = torch.arange(pieces.num_rows)
        self._place(pieces.length, torch.zeros_like(pieces.length))
        self.in_row = torch.zeros(2, pieces.num_rows, dtype=torch.int64)  # labels, documents
        row = pieces.begins // self.row_length
        self.in_row[0].index_add_(0, row, self._num_labels())
        self.in_row[1].index_add_(0, row, 1 + self.has_room.to(torch.int64))  # and a gap after it

    def _pack(self, num_open: int) -> Pieces:
        """Where the documents of ``order`` stand; see ``pack``. A system line has room."""
        lengths = self._lengths(self.order)
        has_room = torch.zeros(len(lengths), dtype=torch.bool)
        if self.lines and self.stride == self.row_length:  # not in evaluations
            has_room = self.lines.fitting(self.cache, self.order, self.row_length)
            lengths = lengths + self.lines.ids.shape[1] * has_room
        pieces = pack(lengths.tolist(), self.row_length, num_open)
        self.has_room = has_room[pieces.document]
        return pieces

    def _num_labels(self) -> Tensor:
        """Labels of each piece, (P,) int64."""
        mask, labels = self.cache.mask, self.cache.labels
        assert mask is not None and labels is not None, "a cache of conversations has them"
        documents, source = self.order[self.pieces.document], self.places.source
        learned, lengths = labels[documents], self.pieces.length
        for i in torch.where(self._lengths(documents) > lengths)[0].tolist():
            begin, end = int(source[i]), int(source[i] + lengths[i])
            learned[i] = mask[begin + 1 : end].sum()  # of a part; its first: before
        return learned

    def __len__(self) -> int:
        """Rows of an epoch, the same in every epoch."""
        return self.pieces.num_rows

    def documents_of(self, rows: Iterable[int]) -> list[int]:
        """As in PretrainDataset."""
        chosen = self.row_order[[row for row in rows if row < len(self)]]
        inside = torch.isin(self.pieces.begins // self.row_length, chosen)
        return self.order[self.pieces.document[inside]].unique().tolist()

    def __getitems__(self, rows: list[int]) -> Batch:
        """As in PretrainDataset."""
        tokens, _ = self._corpus
        mask = self.cache.moved[2] if self.cache.moved else self.cache.mask
        assert mask is not None
        if self.places.source.device != tokens.device:  # ``to`` was called since
            self.places = Places(*(part.to(tokens.device) for part in self.places))
        source, length, begins, row_order, before, line, lines = self.places
        row = torch.as_tensor(rows).to(tokens.device, non_blocking=True)[:, None]  # (B, 1)
        t = torch.arange(self.row_length, device=tokens.device)  # (T,)
        last = len(row_order) - 1
        position = row_order[row.clamp(max=last)] * self.row_length + t
        nth = torch.searchsorted(begins, position, right=True) - 1
        within = position - begins[nth]
        is_real = (within < length[nth]) & (row <= last)
        place = torch.where(is_real, source[nth] + within - before[nth], 0).clamp_(min=0)
        ids = unsigned(tokens[place]).masked_fill_(~is_real, self.pad)
        learned = is_real & mask[place] & (within > before[nth])
        if self.lines:
            of_line = lines[line[nth], within.clamp(max=lines.shape[1] - 1)]
            ids = torch.where(is_real & (within < before[nth]), of_line, ids)
        labels = ids.masked_fill(~learned, IGNORE)
        starts = (t - within).masked_fill_(~is_real, -1)
        inside = self.row_order.new_tensor([row for row in rows if row < len(self)])
        num_labels, num_documents = self.in_row[:, self.row_order[inside]].sum(1).tolist()
        return Batch(ids, labels, starts, num_labels, num_documents + len(rows))


class PreferenceBatch(NamedTuple):
    """Rows of pairs, and where they stand. P: pairs."""

    rows: Batch  # num_labels is P
    first: Tensor  # (P, 2) int64: the first token of chosen and rejected, among the B * T
    length: Tensor  # (P, 2) int64, tokens
    longest: int  # of these
    pair: Tensor  # (P,) int64, its number in the corpus
    reference: Tensor  # (P, 2) float32, log-probability of both answers before training, nats

    @property
    def num_labels(self) -> int:
        """Pairs, each of which has one loss."""
        return self.rows.num_labels

    @property
    def model_inputs(self) -> dict[str, Tensor | int | None]:
        """As of the rows."""
        return self.rows.model_inputs

    def to(self, device: torch.device) -> "PreferenceBatch":
        """As of the rows."""

        def moved(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        return self._replace(
            rows=self.rows.to(device),
            first=moved(self.first),
            length=moved(self.length),
            reference=moved(self.reference),
        )


class DPODataset(SFTDataset):
    """Pairs of a chosen and a rejected conversation, both in the same row.

    Rows have twice ``max_length`` tokens; a conversation longer than ``max_length`` is cut at its
    end. Each row holds as many pairs as fit, without ``packing`` one.

    Args: as SFTDataset; ``data_path`` holds pairs, see dataset/preferences.py."""

    content = staticmethod(pair_content)
    reference: Tensor  # (N, 2) float32, see PreferenceBatch; not a number until it is filled in

    def __init__(
        self,
        data_path: str | list[str] | TokenCache,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 1024,
        **choice: Any,
    ) -> None:
        self.longest = max_length
        super().__init__(data_path, tokenizer, 2 * max_length, **choice)

    def of_all_pairs(self, num_tokens: int) -> Iterator[Any]:
        """Batches of about so many tokens that hold each pair of the corpus once."""
        rows = self.for_evaluation(torch.arange(len(self.reference), dtype=torch.int32))
        yield from map(
            rows.__getitems__,
            SkipBatchSampler(range(len(rows)), max(1, num_tokens // self.row_length)),
        )

    def _lay_out(self, order: Tensor) -> None:
        if not hasattr(self, "separator"):
            num = len(self.cache.offsets) - 1
            pad = torch.tensor(self.pad).to(self.cache.tokens.dtype)  # as stored
            self.separator = torch.where(self.cache.tokens == pad)[0]
            self.reference = torch.full((num, 2), torch.nan)
            assert len(self.separator) == num, "one in each pair"
        super()._lay_out(order)
        rows = torch.arange(self.pieces.num_rows + 1) * self.row_length
        self.pairs_before = torch.searchsorted(self.pieces.begins, rows) // 2  # (R + 1,), by row

    def whole_lengths(self, documents: Tensor) -> Tensor:
        """Tokens of both conversations of these pairs, (N, 2) int64."""
        begin, end = self.cache.offsets[documents], self.cache.offsets[documents + 1]
        middle = self.separator[documents.to(torch.int64)]
        return torch.stack((middle - begin, end - middle - 1), 1)

    @property
    def num_cut(self) -> int:
        """Pairs of which a conversation is longer than ``max_length``."""
        return int((self.whole_lengths(self.documents) > self.longest).any(1).sum())

    def _pack(self, num_open: int) -> Pieces:
        whole = self.whole_lengths(self.order)
        length = whole.clamp(max=self.longest)
        pairs = pack(length.sum(1).tolist(), self.row_length, num_open)
        self.has_room = torch.zeros(2 * len(pairs.begins), dtype=torch.bool)
        length, whole = length[pairs.document], whole[pairs.document]
        zero = torch.zeros_like(pairs.begins)
        return Pieces(
            pairs.document.repeat_interleave(2),
            torch.stack((zero, whole[:, 0] + 1), 1).flatten(),  # after the separator
            length.flatten(),
            torch.stack((pairs.begins, pairs.begins + length[:, 0]), 1).flatten(),
            pairs.num_rows,
        )

    def _num_labels(self) -> Tensor:
        return (self.pieces.first == 0).to(torch.int64)  # one loss for both

    # pyrefly: ignore[bad-override]  # it has what is asked of a batch in training
    def __getitems__(self, rows: list[int]) -> PreferenceBatch:
        """As in PretrainDataset."""
        batch = super().__getitems__(rows)
        inside = [(i, int(self.row_order[row])) for i, row in enumerate(rows) if row < len(self)]
        nth, moved = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for i, row in inside:
            first, end = self.pairs_before[row : row + 2].tolist()
            nth.append(torch.arange(first, end))
            moved.append(torch.full((end - first,), (i - row) * self.row_length))
        pair, shift = torch.cat(nth), torch.cat(moved)[:, None]
        pieces = 2 * pair[:, None] + torch.arange(2)  # (P, 2)
        length = self.pieces.length[pieces]
        number = self.order[self.pieces.document[2 * pair]].to(torch.int64)
        return PreferenceBatch(
            batch,
            self.pieces.begins[pieces] + shift,
            length,
            int(length.max()) if len(pair) else 0,
            number,
            self.reference[number],
        )
