"""System turns that some conversations get in some epochs, so that a model is used to them.

MiniMind draws one for a fifth of the conversations that have none. Here the draw is a pure function
of seed, epoch and conversation, so that a resumed run, and any number of ranks, draw the same.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.conversations import written_out
from dataset.records import DataError
from dataset.token_cache import TokenCache, encode, unsigned

LINES = (
    *("You are a helpful assistant.", "Answer as briefly as you can.", "Be friendly and precise."),
    *("You are an assistant that explains things simply.", "If you do not know, say so."),
    *("你是一个乐于助人的助手。", "请尽量简短地回答。", "回答要友好、准确。"),
    *("你是一个擅长用简单的话解释问题的助手。", "不知道的事情，就说不知道。"),
)


@dataclass
class SystemLines:
    """The lines as the chat template writes them. L: lines, N: documents."""

    ids: Tensor  # (L, longest) int64, what stands before a conversation that begins with the user
    lengths: Tensor  # (L,) int64, of these
    opening: list[int]  # ids that such a conversation begins with

    @classmethod
    def written(cls, tokenizer: PreTrainedTokenizerBase) -> "SystemLines":
        """Raises: DataError if the template writes more than a turn before the user's."""
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        plain = written_out(tokenizer, asked, None)
        texts = []
        for line in LINES:
            text = written_out(tokenizer, [{"role": "system", "content": line}, *asked], None)
            if not text.endswith(plain):
                raise DataError(
                    "--system_share: the tokenizer's chat template writes a conversation without "
                    "a system turn otherwise than with one; use --system_share 0."
                )
            texts.append(text.removesuffix(plain))
        rows = encode(tokenizer, texts)
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = torch.tensor(found)
        (opening,) = encode(tokenizer, [f"{tokenizer.bos_token}user\n"])
        return cls(ids, lengths, opening)

    def fitting(self, cache: TokenCache, documents: Tensor, row_length: int) -> Tensor:
        """Which of these, (N,) int, begin with the user and fit into a row after any line."""
        begin, end = cache.offsets[documents], cache.offsets[documents + 1]
        fits = end - begin + self.ids.shape[1] <= row_length
        for i, token in enumerate(self.opening):
            place = torch.where(begin + i < end, begin + i, begin)
            fits &= unsigned(cache.tokens[place]) == token
        return fits

    def drawn(self, hashes: Tensor, share: float, seed: int, epoch: int) -> Tensor:
        """The line that each conversation gets, (N,) int64, -1 for none; of their hashes, int32."""
        digest = hashlib.blake2b(f"system {seed} {epoch}".encode(), digest_size=7).digest()
        key = int.from_bytes(digest, "little")
        mixed = (hashes.to(torch.int64) + 2**31) ^ key
        for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # splitmix64's finalizer
            mixed = (mixed ^ (mixed >> 30 & 2**34 - 1)) * factor
        mixed = (mixed ^ (mixed >> 31)) & (2**62 - 1)
        line = mixed % len(self.ids)
        return torch.where((mixed // len(self.ids)) % 2**24 < share * 2**24, line, -1)
