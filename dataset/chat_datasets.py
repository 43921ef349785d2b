"""Training rows for conversations: as dataset/lm_dataset.py makes them for texts.

Shapes: B rows in a batch, T tokens in a row, R rows in an epoch, N documents.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.conversations import chat_content
from dataset.lm_dataset import IGNORE, Batch, PretrainDataset, permutation
from dataset.packing import OPEN_ROWS, Pieces, pack
from dataset.token_cache import DEFAULT_CACHE_DIR, TokenCache, build_token_cache, unsigned


class SFTDataset(PretrainDataset):
    """Conversations, whole where they fit into a row; what the assistant says carries the loss.

    How they share rows depends on the seed alone, the order of rows also on the epoch.

    Args: as PretrainDataset; ``data_path`` holds conversations, see dataset/conversations.py, and
        without ``packing``, each begins a row of its own."""

    pieces: Pieces
    row_order: Tensor  # (R,) int64, in this epoch

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
    ) -> None:
        if not isinstance(data_path, TokenCache):
            content = chat_content(tokenizer)
            data_path = build_token_cache(
                data_path, tokenizer, cache_dir, bad_records, content=content
            )
        self.share_rows = packing
        choice = {"seed": seed, "heldout_fraction": heldout_fraction}
        super().__init__(data_path, tokenizer, max_length, **choice)

    def set_epoch(self, epoch: int) -> None:
        """Put the rows into the order of this epoch."""
        if not hasattr(self, "pieces"):
            self._lay_out(self.documents[permutation(len(self.documents), self.seed, -1)])
        self.row_order = permutation(len(self), self.seed, epoch)
        self._places = (*self._places[:3], self.row_order)

    def _lay_out(self, order: Tensor) -> None:
        """Pack these documents, (N,) int32, into rows."""
        self.order = order
        self.pieces = pieces = pack(
            self._lengths(order).tolist(), self.row_length, OPEN_ROWS if self.share_rows else 0
        )
        self.row_order = torch.arange(pieces.num_rows)
        documents = order[pieces.document].to(torch.int64)
        source = self.cache.offsets[documents] + pieces.first
        self._places = (source, pieces.length, pieces.begins, self.row_order)
        mask, labels = self.cache.mask, self.cache.labels
        assert mask is not None and labels is not None, "a cache of conversations has them"
        learned = labels[documents]
        for i in torch.where(self._lengths(documents) > pieces.length)[0].tolist():
            begin, end = int(source[i]), int(source[i] + pieces.length[i])
            learned[i] = mask[begin + 1 : end].sum()  # of a part; its first: before
        self.in_row = torch.zeros(2, pieces.num_rows, dtype=torch.int64)  # labels, documents
        row = pieces.begins // self.row_length
        self.in_row[0].index_add_(0, row, learned)
        self.in_row[1].index_add_(0, row, torch.ones_like(row))

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
        if self._places[0].device != tokens.device:  # ``to`` was called since
            self._places = tuple(part.to(tokens.device) for part in self._places)
        source, length, begins, row_order = self._places
        row = torch.as_tensor(rows).to(tokens.device, non_blocking=True)[:, None]  # (B, 1)
        t = torch.arange(self.row_length, device=tokens.device)  # (T,)
        last = len(row_order) - 1
        position = row_order[row.clamp(max=last)] * self.row_length + t
        nth = torch.searchsorted(begins, position, right=True) - 1
        within = position - begins[nth]
        is_real = (within < length[nth]) & (row <= last)
        place = torch.where(is_real, source[nth] + within, 0)
        ids = unsigned(tokens[place]).masked_fill_(~is_real, self.pad)
        labels = ids.masked_fill(~(is_real & mask[place] & (within > 0)), IGNORE)
        starts = (t - within).masked_fill_(~is_real, -1)
        inside = self.row_order.new_tensor([row for row in rows if row < len(self)])
        num_labels, num_documents = self.in_row[:, self.row_order[inside]].sum(1).tolist()
        return Batch(ids, labels, starts, num_labels, num_documents + len(rows))
