"""A hundred prompts as people type them, and whether a continuation answers one.

plain_prompts.tsv was written before any model was asked; the sample that the demo trains on must
not contain a prompt together with its answer."""

import functools
import re
from pathlib import Path
from typing import NamedTuple


class PlainPrompt(NamedTuple):
    kind: str  # of fact: prompts of one kind have answers that could be confused
    text: str
    answers: tuple[str, ...]  # any of them is right

    @property
    def is_question(self) -> bool:
        return self.text[-1] in "?？"


def read_prompts(name: str = "plain_prompts.tsv") -> list[PlainPrompt]:
    """All of them, as they stand in the file."""
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    return [PlainPrompt(kind, text, tuple(answers.split(";"))) for kind, text, answers in rows]


PROMPTS = read_prompts()
QUESTIONS = read_prompts("plain_questions.tsv")  # for models that answer


def first_place(answers: tuple[str, ...], text: str) -> float:
    """Where the first of the answers begins in the text, a word by itself; inf if none does."""
    word = {answer: r"\b" if answer.isascii() else "" for answer in answers}
    found = [re.search(word[a] + re.escape(a), text, re.IGNORECASE) for a in answers]
    return min((match.start() for match in found if match), default=float("inf"))


def is_right(prompt: PlainPrompt, continuation: str) -> bool:
    """The first sentence names the answer, and no other answer of its kind and language before it.

    What the prompt names itself is no answer: "Q: Paris is the capital of? A: Paris ..."."""
    first = re.split(r"(?<=[.。！!?？])|\n", continuation.strip())[0]
    others = {
        answer
        for other in (QUESTIONS if prompt in QUESTIONS else PROMPTS)
        for answer in other.answers
        if (other.kind, other.text.isascii()) == (prompt.kind, prompt.text.isascii())
        and answer not in prompt.answers
        and answer.lower() not in prompt.text.lower()
    }
    place = first_place(prompt.answers, first)
    return place < float("inf") and place <= first_place(tuple(others), first)


@functools.cache
def without_spaces_and_quotes(text: str) -> str:
    return re.sub(r"[\s\"“”]", "", text).lower()


def num_stated(prompt: PlainPrompt, document: str) -> int:
    """How often a document has the prompt with its answer: at once, after a question within 40
    characters; whatever the case, spaces and quotes."""
    gap = "[^?？]{0,40}?" if prompt.is_question else ""
    plain = without_spaces_and_quotes(document)
    asked = re.escape(without_spaces_and_quotes(prompt.text))
    answers = "|".join(re.escape(re.sub(r"\s", "", answer).lower()) for answer in prompt.answers)
    return len(re.findall(f"{asked}(?:the)?{gap}(?:{answers})", plain))
