"""The whole demo, as the README promises it; minutes long, so only with ``pytest -m slow``."""

import sys
from pathlib import Path

import pytest

import eval_llm
from tests.running import run


@pytest.mark.slow
def test_the_demo_s_model_knows_its_facts_in_other_words(tmp_path: Path) -> None:
    places = ["--save_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path)]
    program = [sys.executable, "train_pretrain.py", "--preset", "demo", "--device", "cpu"]
    done = run([*program, *places, "--checkpoint_dir", str(tmp_path)], timeout=1200)
    assert done.returncode == 0, done.stderr
    words = ["--save_dir", str(tmp_path / "out"), "--device", "cpu", "--temperature", "0"]
    answers = run([sys.executable, "eval_llm.py", *words]).stdout
    known = [p for p, answer in eval_llm.PROMPTS.items() if f"{p}{answer}" in answers]
    assert len(known) >= 8, answers
