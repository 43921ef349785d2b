"""Conversations: checked, written out by the tokenizer's chat template, with a mask of what the
assistant says.

A record holds ``conversations`` (MiniMind's name) or ``messages``: turns with a role and a content.
An assistant's turn may have reasoning_content and tool_calls; a system turn, or the record, tools.
Or it holds a ``text``, as in pretraining, all of which is learned and nothing held out.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.records import JSON_TYPES, Content, DataError, encodable, read_documents, text_of

COLUMNS = ("conversations", "messages", "tools", "text")
ROLES = ("system", "user", "assistant", "tool")
KEYS = ("role", "content", "reasoning_content", "tools", "tool_calls", "name", "tool_call_id")
# Which role may follow which; None: the beginning.
FOLLOWERS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
NO_THINKING = "<think>\n\n</think>\n\n"  # what MiniMind's template writes where none was given
EXAMPLE = '{"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
Turn = dict[str, Any]


def conversation_of(record: dict[str, object]) -> tuple[list[Turn], list | None]:
    """The turns of a record and its tools. Raises: ValueError that says what is wrong with them."""
    found = {name: record[name] for name in COLUMNS[:2] if record.get(name) is not None}
    if len(found) != 1:
        keys = ", ".join(map(repr, record)) or "none"
        what = "both of" if found else "none of"
        raise ValueError(f'{what} "conversations" and "messages"; its keys: {keys:.80}')
    ((name, turns),) = found.items()
    return turns_of(turns, name, record.get("tools"))


def is_conversation(record: dict[str, object]) -> bool:
    """Whether it holds turns."""
    return any(record.get(name) is not None for name in COLUMNS[:2])


def turns_of(turns: object, name: str, tools: object = None) -> tuple[list[Turn], list | None]:
    """As ``conversation_of``, of the value of its key ``name``."""
    if not isinstance(turns, list):
        raise ValueError(f'"{name}" is a JSON {JSON_TYPES.get(type(turns), "number")}')
    tools = None if tools in (None, "") else parsed(tools, "tools")
    checked: list[Turn] = []
    for number, turn in enumerate(turns, 1):
        before = checked[-1] if checked else None
        try:
            checked.append(turn_of(turn, before))
            if given := checked[-1].pop("tools", None):
                tools = parsed(given, "tools")
        except ValueError as error:
            raise ValueError(f'turn {number} of "{name}": {error}') from None
    if not any(turn["role"] == "assistant" for turn in checked):
        raise ValueError(f'no turn of an assistant in "{name}"')
    return checked, tools


def turn_of(turn: object, before: Turn | None) -> Turn:
    """A turn, without keys that hold nothing. Raises: ValueError."""
    if not isinstance(turn, dict):
        raise ValueError(f"found a JSON {JSON_TYPES.get(type(turn), 'number')}")
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" in turn and "value" in turn:
        raise ValueError('keys "from" and "value", expected "role" and "content"')
    if unknown := [key for key in turn if key not in KEYS]:
        raise ValueError(f"key {unknown[0]!r:.40}, expected {', '.join(KEYS)}")
    role = turn.get("role")
    if role not in ROLES:
        raise ValueError(f"role {role!r:.40}, expected {', '.join(ROLES)}")
    expected = FOLLOWERS[before["role"] if before else None]
    if role not in expected:
        place = f"after {before['role']}" if before else "at the beginning"
        raise ValueError(f"role {role} {place}, expected {' or '.join(expected)}")
    if role == "tool" and before and before["role"] == "assistant" and "tool_calls" not in before:
        raise ValueError("role tool after an assistant without tool_calls")
    if turn.get("tool_calls") in ("", []):
        del turn["tool_calls"]
    if "tool_calls" in turn:
        turn["tool_calls"] = parsed(turn["tool_calls"], "tool_calls")
        turn.setdefault("content", "")
    for key in ("content", "reasoning_content"):
        if key in turn and not isinstance(turn[key], str):
            raise ValueError(f'"{key}" is a JSON {JSON_TYPES.get(type(turn[key]), "number")}')
        encodable(turn.get(key, ""), key)
    if "content" not in turn or not (turn["content"].strip() or "tool_calls" in turn):
        if role in ("user", "assistant"):
            raise ValueError(f"no content in the turn of the {role}")
        turn.setdefault("content", "")
    if turn.get("reasoning_content") == "":
        del turn["reasoning_content"]
    if turn.get("tools") in ("", []):
        del turn["tools"]
    return turn


def parsed(value: object, key: str) -> list:
    """A list, or the one that a string holds as JSON. Raises: ValueError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'"{key}" is no JSON ({error})') from None
    if not isinstance(value, list):
        raise ValueError(f'"{key}" is a JSON {JSON_TYPES.get(type(value), "number")}, not a list')
    return value


class Marks:
    """Where an assistant's turn begins and ends, as text and as token ids.

    Raises: DataError if the tokenizer has no chat template, or one with other marks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "--tokenizer_path: the tokenizer has no chat template. Set chat_template in it, or "
                "use the bundled one, --tokenizer_path model."
            )
        begin, end = f"{tokenizer.bos_token}assistant\n", f"{tokenizer.eos_token}\n"
        self.text = begin, end
        self.eos = tokenizer.eos_token_id
        self.num_mark_bytes = len(f"{tokenizer.bos_token}{tokenizer.eos_token}".encode())
        self.begin: list[int] = tokenizer(begin, add_special_tokens=False)["input_ids"]
        self.end: list[int] = tokenizer(end, add_special_tokens=False)["input_ids"]
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = written_out(tokenizer, example, None)
        if begin not in text or not text.endswith(end):
            raise DataError(
                f"--tokenizer_path: its chat template begins and ends an assistant's turn "
                f"otherwise than with {begin!r} and {end!r}."
            )

    def is_plain(self, ids: Sequence[int]) -> bool:
        """Whether a document is a text rather than a conversation, whose last turn ends a line."""
        return len(ids) > 0 and ids[-1] == self.eos

    def num_bytes(self, text: str) -> int:
        """UTF-8 bytes of what the assistant says, or of a text, without marks."""
        begin, end = self.text
        if not text.endswith(end):
            return len(text.encode()) - self.num_mark_bytes
        said = (part.split(end)[0] for part in text.split(begin)[1:])
        return sum(len(part.encode()) for part in said)

    def spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """What the assistant says, with the mark of its end: (first, past the last) of each.

        Source: MiniMind's SFTDataset, which learns the same tokens."""
        if self.is_plain(ids):
            return [(1, len(ids))]
        spans, at, ids = [], 0, list(ids)
        while (begin := find(ids, self.begin, at)) is not None:
            begin += len(self.begin)
            end = find(ids, self.end, begin)
            at = len(ids) if end is None else end + len(self.end)
            spans.append((begin, at))
        return spans


def find(ids: list[int], part: list[int], start: int) -> int | None:
    """Where these ids first occur from ``start`` on; None if they do not."""
    while True:
        try:
            start = ids.index(part[0], start)
        except ValueError:
            return None
        if ids[start : start + len(part)] == part:
            return start
        start += 1


def written_out(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    tools: list | None,
    for_answer: bool = False,
) -> str:
    """A conversation as the template writes it. Raises: ValueError if it cannot.

    Args: for_answer: whether to go on to where the assistant's answer begins."""
    try:
        text = tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=for_answer
        )
        str(text).encode()  # an unpaired surrogate, in the names of tools and wherever else
        return str(text)
    except Exception as error:  # a template is a program of its own
        reason = str(error).split("\n")[0]
        raise ValueError(f"the chat template cannot write it ({reason:.120})") from None


def checked_text(
    tokenizer: PreTrainedTokenizerBase, marks: Marks, turns: list[Turn], tools: list | None
) -> str:
    """``written_out``, in which only the assistant's turns begin like one. Raises: ValueError."""
    text, begin = written_out(tokenizer, turns, tools), marks.text[0]
    if text.count(begin) != sum(turn["role"] == "assistant" for turn in turns):
        raise ValueError(f"a turn contains {begin!r}, which begins a turn of the assistant")
    return text


def keeps_empty_thinking(text: str, share: float) -> bool:
    """Whether a conversation is among this share of all, which depends on what it says alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < share * 2**32


def chat_content(tokenizer: PreTrainedTokenizerBase, empty_thinking: float = 1.0) -> Content:
    """Documents that are a conversation each, written out.

    Args: empty_thinking: share of the conversations that keep NO_THINKING.
    Raises: DataError, see ``Marks``."""
    marks = Marks(tokenizer)

    def document(record: dict[str, object]) -> str:
        if isinstance(record.get("text"), str) and not is_conversation(record):
            text = text_of("text", record)
            return f"{tokenizer.bos_token}{text}{tokenizer.eos_token}" if text.strip() else ""
        text = checked_text(tokenizer, marks, *conversation_of(record))
        keeps = empty_thinking == 1 or keeps_empty_thinking(text, empty_thinking)
        return text if keeps else text.replace(NO_THINKING, "")

    what = 'turns in "conversations" or "messages"'
    name = f"conversations {tokenizer.chat_template}"
    if empty_thinking < 1:
        name += f" {empty_thinking}"
    return Content(document, COLUMNS, EXAMPLE, what, name, marks)


def holds_conversations(path: Path) -> bool:
    """Whether the first record of a file is a conversation rather than a text."""
    return holds(path, COLUMNS[:2])


def holds(path: Path, names: tuple[str, ...]) -> bool:
    """Whether the first record of a file has one of these."""
    found: list[bool] = []

    def look(record: dict[str, object]) -> str:
        found.append(any(record.get(name) is not None for name in names))
        return ""

    content = Content(look, names, EXAMPLE, "", "", marks=True)
    try:
        next(read_documents(path, lambda message: None, content), None)
    except DataError:
        return False  # reading it as text will tell
    return found[:1] == [True]
