"""Conversations into rows: none is cut that fits into one, and little room is left over."""

from bisect import bisect_left, insort
from typing import NamedTuple

import torch
from torch import Tensor

OPEN_ROWS = 256  # at most, that are looked at for each conversation


class Pieces(NamedTuple):
    """Conversations, or parts of those longer than a row, by where they stand. P: pieces."""

    document: Tensor  # (P,) int64, the nth of those that were packed
    first: Tensor  # (P,) int64, its first token that stands here
    length: Tensor  # (P,) int64, tokens
    begins: Tensor  # (P,) int64, ascending: row * T + place in the row
    num_rows: int


def pack(lengths: list[int], row_length: int, num_open: int = OPEN_ROWS) -> Pieces:
    """Put each conversation into the fullest row in which it has room, in their order.

    One that is longer than a row begins a new one. It goes on in the next with the token that it
    stopped at, so that each of its tokens but the first is predicted once. ``row_length``: T.

    Source: best-fit (Johnson et al. 1974), here among the ``num_open`` rows with most room."""
    pieces: list[tuple[int, int, int, int]] = []  # place, document, first, length
    open_rows: list[tuple[int, int]] = []  # room that is left, row; ascending
    num_rows = 0
    for document, total in enumerate(lengths):
        first = 0
        while total - first > row_length:
            pieces.append((num_rows * row_length, document, first, row_length))
            first += row_length - 1
            num_rows += 1
        length = total - first
        at = bisect_left(open_rows, (length, 0))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row, num_rows = row_length, num_rows, num_rows + 1
        pieces.append((row * row_length + row_length - room, document, first, length))
        if room > length:
            insort(open_rows, (room - length, row))
            if len(open_rows) > num_open:
                del open_rows[0]
    begins, document, first, length = torch.tensor(sorted(pieces)).T.contiguous()
    return Pieces(document, first, length, begins, num_rows)
