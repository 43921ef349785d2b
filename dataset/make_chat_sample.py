"""Write the small bilingual sample of conversations that the demo is fine-tuned on.

    python -m dataset.make_chat_sample    # chat_sample.jsonl, and preference_sample.jsonl

They are about the facts of the sample that the demo is pretrained on (make_sample.py): one to three
questions, each answered briefly or by a sentence. The pairs for train_dpo.py prefer brief answers.
"""

import argparse
import json
import random
from pathlib import Path

from dataset.make_sample import (
    Fact,
    capital,
    clause,
    expand,
    fields,
    finish,
    phrases,
    pick_fact,
    same_relation,
    write_records,
)

SEED = 20261126
NUM_CONVERSATIONS, NUM_PAIRS = 2400, 600
FOLDER = Path(__file__).resolve().parent
# Questions for the fine-tuned model and their answers; the samples must not contain them.
PLAIN_QUESTIONS = FOLDER.parent / "tests" / "plain_questions.tsv"
SYSTEM = {
    "en": ("You are a helpful assistant.", "Answer the questions.", "You are a friendly teacher."),
    "zh": ("你是一个乐于助人的助手。", "请回答问题。", "你是一位亲切的老师。"),
}
# How people ask: around a question that begins in lower case, or around one in Chinese.
POLITE = {
    "en": (
        *["{Q}"] * 6,
        *("[Hello|Hi|Hey], {q}", "[Please|Please,] tell me: {q}", "I have a question: {q}"),
        *("[Can you help me|Do you know]: {q}", "{Q} [Please|Thanks|Thank you]."),
        *("My [son|daughter|friend|sister] asks: {q}", "[Quick question|One more question]: {q}"),
    ),
    "zh": (
        *["{q}"] * 6,
        *("你好，{q}", "请问，{q}", "[请告诉我|告诉我]，{q}", "我想[知道|问一下]，{q}"),
        *("[老师|朋友]问我，{q}", "{q}谢谢。", "[再问一个问题|帮我想一想]，{q}"),
    ),
}
Turn = dict[str, str]


def asked_and_answers(rng: random.Random, lang: str, fact: Fact) -> tuple[str, str, str]:
    """A question about a fact, its brief answer, and a sentence that answers it."""
    form = fields(lang, fact[1])
    question, brief = rng.choice(phrases(lang, fact[0]).questions)
    question = expand(rng, question.format(**form))
    asked = expand(rng, rng.choice(POLITE[lang])).format(q=question, Q=capital(question))
    sentence = finish(lang, clause(rng, lang, fact))
    return capital(asked), finish(lang, expand(rng, brief.format(**form))), sentence


def turns(rng: random.Random, lang: str, heldout: set[str]) -> list[Turn]:
    """One conversation, without questions that are kept for tests."""
    first, count = pick_fact(rng), rng.choice((1, 1, 2, 3))
    found: list[Turn] = []
    if rng.random() < 0.15:
        found.append({"role": "system", "content": rng.choice(SYSTEM[lang])})
    facts = same_relation(rng, first, count) if rng.random() < 0.5 else [first]
    facts += [pick_fact(rng) for _ in range(count - len(facts))]
    for fact in facts:
        question, brief, sentence = asked_and_answers(rng, lang, fact)
        if question.lower() not in heldout:
            answer = sentence if rng.random() < 0.4 else brief
            found.append({"role": "user", "content": question})
            found.append({"role": "assistant", "content": answer})
    return found


def plain_questions(path: Path = PLAIN_QUESTIONS) -> set[str]:
    """The questions that are kept for tests, in lower case."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return {line.split("\t")[1].lower() for line in lines}


def make_conversations(seed: int = SEED) -> list[list[Turn]]:
    """As many in each language, no two the same."""
    rng, heldout = random.Random(seed), plain_questions()
    found: dict[str, list[Turn]] = {}
    while len(found) < NUM_CONVERSATIONS:
        made = turns(rng, ("en", "zh")[len(found) % 2], heldout)
        if made and made[-1]["role"] == "assistant":
            found.setdefault(json.dumps(made, ensure_ascii=False), made)
    return list(found.values())


def make_pairs(seed: int = SEED + 1) -> list[dict[str, list[Turn]]]:
    """Pairs of a brief answer, which is chosen, and a sentence, which is rejected."""
    rng, heldout = random.Random(seed), plain_questions()
    found: dict[str, dict[str, list[Turn]]] = {}
    while len(found) < NUM_PAIRS:
        lang = ("en", "zh")[len(found) % 2]
        question, brief, sentence = asked_and_answers(rng, lang, pick_fact(rng))
        if question.lower() in heldout or len(brief) >= 0.7 * len(sentence):
            continue
        asked = {"role": "user", "content": question}
        pair = {
            name: [asked, {"role": "assistant", "content": answer}]
            for name, answer in (("chosen", brief), ("rejected", sentence))
        }
        found.setdefault(json.dumps(pair, ensure_ascii=False), pair)
    return list(found.values())


def main() -> None:
    """Parse the command line and write the samples."""
    parser = argparse.ArgumentParser(description="Write the demo's conversations and pairs.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write them")
    folder = parser.parse_args().folder
    write_records(
        folder / "chat_sample.jsonl", [{"conversations": c} for c in make_conversations()]
    )
    write_records(folder / "preference_sample.jsonl", make_pairs())
    print(f"{NUM_CONVERSATIONS} conversations, {NUM_PAIRS} pairs in {folder}")


if __name__ == "__main__":
    main()
