"""What the demo's model is asked: the prompts, the sample; and, slow, what the model answers."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import eval_llm
from dataset import make_chat_sample
from model.generation import generating_model
from tests.helpers import ROOT, shipped_tokenizer
from tests.plain_prompts import PROMPTS, QUESTIONS, is_right, num_stated
from tests.running import run_command
from trainer.device import default_dtype
from trainer.samples import continuations, encode_prompt
from trainer.trainer_utils import setup_seed


def sample() -> list[str]:
    lines = (ROOT / "dataset/pretrain_sample.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_there_are_a_hundred_prompts_half_of_them_chinese() -> None:
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS) == 100
    assert sum(prompt.text.isascii() for prompt in PROMPTS) == 50
    assert sum(prompt.is_question for prompt in PROMPTS) > 30


def test_no_prompt_stands_with_its_answer_in_the_sample_more_than_once() -> None:
    documents = sample()
    stated = {p.text: sum(num_stated(p, document) for document in documents) for p in PROMPTS}
    assert {text: num for text, num in stated.items() if num > 1} == {}
    together = "\n".join(documents).lower()
    assert [p.text for p in PROMPTS if not any(a.lower() in together for a in p.answers)] == []


def test_what_counts_as_stated() -> None:
    said = {p.text: p for p in PROMPTS}
    france, asked = said["The capital of France is"], said["What is the capital of France?"]
    assert num_stated(france, 'We know that the capital of France is "Paris".') == 1
    assert num_stated(france, "The capital of France is called Paris.") == 0
    assert num_stated(asked, "Q: What is the capital of France?\nA: Paris is its capital.") == 1
    assert num_stated(asked, "Paris! What is the capital of France?") == 0


@pytest.mark.parametrize(
    ("prompt", "continuation", "right"),
    [
        ("The capital of France is", " Paris.", True),
        ("The capital of France is", " Parisian", True),  # a word may go on, as bakes does for bake
        ("The capital of France is", " Rome, not Paris.", False),
        ("The capital of France is", " Lyon.\nParis is the capital.", False),
        ("What is the capital of France?", "\nThe capital of France is Paris.\nWhat", True),
        ("Paris is the capital of", " China. France is", False),
        ("What does a monkey like to eat?", " A monkey likes bananas.", True),
        ("埃及在哪个洲？", "\n埃及在非洲。", True),
        ("埃及在哪个洲？", "亚洲。非洲", False),
    ],
)
def test_what_counts_as_right(prompt: str, continuation: str, right: bool) -> None:
    assert is_right(next(p for p in PROMPTS if p.text == prompt), continuation) == right


def test_the_built_in_prompts_are_ten_of_them() -> None:
    known = {prompt.text: prompt.answers for prompt in PROMPTS}
    assert len(eval_llm.PROMPTS) == 10
    assert all(answer in known[prompt] for prompt, answer in eval_llm.PROMPTS.items())


def test_there_are_a_hundred_questions_that_no_sample_contains() -> None:
    assert len({question.text for question in QUESTIONS}) == len(QUESTIONS) == 100
    assert sum(question.text[0].isascii() for question in QUESTIONS) == 50
    together = "\n".join(
        (ROOT / "dataset" / f"{name}_sample.jsonl").read_text(encoding="utf-8").lower()
        for name in ("pretrain", "chat", "preference")
    )
    assert [
        q.text
        for q in QUESTIONS
        if json.dumps(q.text, ensure_ascii=False)[1:-1].lower() in together
    ] == []
    assert not {question.text for question in QUESTIONS} & {prompt.text for prompt in PROMPTS}


def test_the_bundled_conversations_are_those_that_the_script_writes(tmp_path: Path) -> None:
    made = make_chat_sample.make_conversations()
    make_chat_sample.write_records(tmp_path / "chat.jsonl", [{"conversations": c} for c in made])
    make_chat_sample.write_records(tmp_path / "preference.jsonl", make_chat_sample.make_pairs())
    for name in ("chat", "preference"):
        bundled = ROOT / "dataset" / f"{name}_sample.jsonl"
        assert bundled.read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()


# ------------------------------------------------------------------------ the whole demo, minutes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as the README starts it; gives the folder of its weights."""
    folder = tmp_path_factory.mktemp("demo")
    places = ["--save_dir", str(folder / "out"), "--cache_dir", str(folder)]
    program = [sys.executable, "train_pretrain.py", "--preset", "demo", "--device", "cpu"]
    done = run_command([*program, *places, "--checkpoint_dir", str(folder)], timeout=3600)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.slow
def test_the_readme_s_prompts_are_answered_as_they_are_printed(trained: Path) -> None:
    """All ten in bfloat16, in which the README's answers were made. A CPU that lacks it trains in
    float32, where the banana's colour may be wrong, as the README's limits say."""
    words = ["--save_dir", str(trained), "--device", "cpu"]
    printed = run_command([sys.executable, "eval_llm.py", *words, "--temperature", "0"]).stdout
    known = {prompt.text: prompt for prompt in PROMPTS}
    wrong = [p for p in eval_llm.PROMPTS if not is_right(known[p], printed.partition(p)[2])]
    admitted = [] if default_dtype("cpu") == "bfloat16" else ["What colour is a banana?"]
    assert wrong in ([], admitted), (wrong, printed)


def num_right(folder: Path, **drawn: float) -> int:
    """How many of the hundred are answered, as eval_llm.py would."""
    words = ["--save_dir", str(folder), "--device", "cpu"]
    args = eval_llm.build_parser().parse_args(words)
    tokenizer = shipped_tokenizer()
    qwen, num = generating_model(eval_llm.load_model(args, tokenizer)), 0
    temperature = drawn.get("temperature", args.temperature)
    for prompt in PROMPTS:
        setup_seed(int(drawn.get("seed", args.seed)))
        ids = encode_prompt(tokenizer, prompt.text)
        out = qwen.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            **eval_llm.sampling(temperature, args.top_p, args.top_k),
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        num += is_right(prompt, text)
    return num


@pytest.fixture(scope="module")
def fine_tuned(trained: Path) -> Path:
    """The demo, fine-tuned and then taught to be brief, as the README says."""
    places = ["--save_dir", trained]
    places += [
        word for name in ("cache_dir", "checkpoint_dir") for word in (f"--{name}", trained.parent)
    ]
    for program in ("train_full_sft.py", "train_dpo.py"):
        command = [sys.executable, program, "--preset", "demo", "--device", "cpu", *places]
        done = run_command([*map(str, command)], timeout=3600)
        assert done.returncode == 0, done.stderr
    return trained


def is_short(answer: str) -> bool:
    """Up to three words, or six Chinese characters."""
    chinese = re.findall("[\u4e00-\u9fff]", answer)
    return len(chinese) <= 6 if chinese else len(answer.split()) <= 3


@pytest.mark.slow
def test_questions_are_answered_in_words_that_were_never_seen(fine_tuned: Path) -> None:
    """And after learning which answers are preferred, in few words."""
    tokenizer, num_short = shipped_tokenizer(), {}
    for name in ("full_sft", "dpo"):
        words = ["--save_dir", str(fine_tuned), "--device", "cpu", "--weight", name]
        model = eval_llm.load_model(eval_llm.build_parser().parse_args(words), tokenizer)
        texts, repeated = continuations(model, tokenizer, [q.text for q in QUESTIONS], chat=True)
        wrong = {q.text: texts[q.text] for q in QUESTIONS if not is_right(q, texts[q.text])}
        assert len(wrong) <= 10, (name, wrong)
        assert repeated < 0.05
        num_short[name] = sum(map(is_short, texts.values()))
    assert num_short["full_sft"] < 90 and num_short["dpo"] >= 95, num_short


@pytest.mark.slow
def test_plain_prompts_are_answered_greedily(trained: Path) -> None:
    assert num_right(trained, temperature=0) >= 95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_plain_prompts_are_answered_at_the_default_temperature(trained: Path, seed: int) -> None:
    assert num_right(trained, seed=seed) >= 90
