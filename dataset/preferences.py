"""Pairs of conversations, of which one is preferred, as documents of a token cache.

A record holds ``chosen`` and ``rejected``, lists of turns as in dataset/conversations.py. Both
begin with the same turns, the prompt; from the first turn that differs, the assistant's, both carry
the loss. A document is both as the chat template writes them, with a padding token between.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dataset.conversations import (
    Marks,
    Turn,
    chat_content,
    checked_text,
    holds,
    holds_conversations,
    turns_of,
)
from dataset.records import Content, DataError

COLUMNS = ("chosen", "rejected", "tools")
EXAMPLE = '{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}'


def pair_of(record: dict[str, object]) -> tuple[list[Turn], list[Turn], list | None]:
    """Chosen, rejected and tools. Raises: ValueError that says what is wrong with them."""
    for name in COLUMNS[:2]:
        if record.get(name) is None:
            keys = ", ".join(map(repr, record)) or "none"
            raise ValueError(f'no "{name}"; its keys: {keys:.80}')
    chosen, tools = turns_of(record["chosen"], "chosen", record.get("tools"))
    rejected, others = turns_of(record["rejected"], "rejected", record.get("tools"))
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same')
    at = num_common(chosen, rejected)
    roles = {turns[at]["role"] if at < len(turns) else None for turns in (chosen, rejected)}
    if tools != others or roles != {"assistant"}:
        raise ValueError(
            f'"chosen" and "rejected" have different prompts (turn {at + 1}), expected the same '
            f"turns up to an answer of the assistant"
        )
    return chosen, rejected, tools


def num_common(one: Sequence, other: Sequence) -> int:
    """How many elements both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class PairMarks(Marks):
    """What of a pair is learned: the turns of the assistant after the prompt.

    Raises: DataError as Marks, or if the tokenizer has no padding token of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        own, text = tokenizer.pad_token_id, str(tokenizer.pad_token)
        if own is None or own in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise DataError(
                "--tokenizer_path: the tokenizer has no padding token of its own, which separates "
                "chosen from rejected. Set pad_token in it, or use the bundled one."
            )
        self.separator, self.separator_id = text, own

    def num_bytes(self, text: str) -> int:
        """As in Marks, of both."""
        return sum(map(super().num_bytes, text.split(self.separator)))

    def spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """As in Marks, without what both begin with."""
        ids = list(ids)
        middle = ids.index(self.separator_id)
        sides = ids[:middle], ids[middle + 1 :]
        common = num_common(*sides)
        found = []
        for start, side in zip((0, middle + 1), sides, strict=True):
            spans = super().spans(side)
            found += [(start + first, start + end) for first, end in spans if end > common]
        return found


def pair_content(tokenizer: PreTrainedTokenizerBase) -> Content:
    """Documents that are a pair each. Raises: DataError, see ``PairMarks``."""
    marks = PairMarks(tokenizer)

    def document(record: dict[str, object]) -> str:
        chosen, rejected, tools = pair_of(record)
        texts = [checked_text(tokenizer, marks, turns, tools) for turns in (chosen, rejected)]
        if any(marks.separator in text for text in texts):
            raise ValueError(f"a turn contains {marks.separator!r}, the padding token")
        if texts[0] == texts[1]:
            raise ValueError('the chat template writes "chosen" and "rejected" the same')
        return marks.separator.join(texts)

    what = 'turns in "chosen" and "rejected"'
    name = f"pairs {marks.separator} {tokenizer.chat_template}"
    return Content(document, COLUMNS, EXAMPLE, what, name, marks)


def content_of(
    path: Path, tokenizer: PreTrainedTokenizerBase, empty_thinking: float = 1.0
) -> Content | None:
    """What a file's records hold, by the first: pairs or conversations; None: texts.

    Args: empty_thinking: of conversations, see ``chat_content``.
    Raises: DataError, see ``PairMarks``."""
    if holds(path, COLUMNS[:2]):
        return pair_content(tokenizer)
    return chat_content(tokenizer, empty_thinking) if holds_conversations(path) else None
