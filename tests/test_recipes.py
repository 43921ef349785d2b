"""The arithmetic of the contest of recipes, and what makes a run another one."""

import argparse
import concurrent.futures
import json
import math
from pathlib import Path

import pytest
import torch

from bench import compare_recipes
from bench.compare_recipes import (
    HELD_OUT,
    Contest,
    Trial,
    bare,
    excerpt,
    share_needed,
    split,
    z_score,
)
from bench.measuring import words
from dataset.token_cache import build_token_cache
from trainer.command_line import parse_flags
from trainer.flags import RECIPES
from trainer.weights import load_tokenizer


def test_what_ours_needs_lies_between_its_runs() -> None:
    points = {1000: 3.0, 4000: 2.0, 9000: 1.5}
    assert share_needed(points, 3.5) == 1000, "not fewer than in its shortest run"
    assert share_needed(points, 2.0) == pytest.approx(4000)
    assert share_needed(points, 2.5) == pytest.approx(math.sqrt(1000 * 4000))
    assert share_needed(points, 1.4) == math.inf


def test_z_is_the_difference_over_its_standard_error() -> None:
    assert z_score([1.0], [2.0, 3.0]) is None
    assert z_score([1.0, 3.0], [5.0, 9.0]) == pytest.approx((7 - 2) / math.sqrt(2 / 2 + 8 / 2))


def test_the_last_documents_are_kept_aside(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(100)))
    trained, kept = split(corpus, tmp_path)
    assert len(kept.read_bytes().splitlines()) == round(100 * HELD_OUT)
    assert trained.read_bytes() + kept.read_bytes() == corpus.read_bytes()
    assert kept.read_bytes().endswith(b'{"text": "99"}\n')


def test_padded_rows_get_more_documents_for_the_same_tokens(tmp_path: Path) -> None:
    """As what is cut off teaches nothing."""
    tokenizer, text = load_tokenizer("model"), "a b c d e f g h " * 100
    num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert num_tokens > 400
    source = tmp_path / "train.jsonl"
    source.write_text(20 * (json.dumps({"text": text}) + "\n"))
    cache = build_token_cache([str(source)], tokenizer, str(tmp_path / "cache"))
    for padded, of_a_document in ((False, num_tokens + 1), (True, 339)):
        for documents in (1, 3):
            path = excerpt(source, cache, documents * of_a_document, padded)
            assert len(path.read_text().splitlines()) == documents
    with pytest.raises(SystemExit, match="fewer than"):
        excerpt(source, cache, 21 * num_tokens, False)


def test_comments_do_not_make_another_run_but_code_does(tmp_path: Path) -> None:
    path, found = tmp_path / "code.py", []
    for text in (
        'def f(x):\n    """Twice."""\n    return 2 * x\n',
        'def f(x):  # a comment\n    """Two times."""\n\n    return 2 * x\n',
        'def f(x):\n    """Twice."""\n    return 3 * x\n',
    ):
        path.write_text(text)
        found.append(bare(path))
    assert found[0] == found[1] != found[2]


class InThisProcess(concurrent.futures.Executor):
    """Runs at once what it is given."""

    def submit(self, function, /, *given):
        future = concurrent.futures.Future()
        future.set_result(function(*given))
        return future


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Contest, list[Trial]]:
    """One whose runs end where a formula says, and the runs that were made."""
    made: list[Trial] = []

    def run_trial(trial: Trial, *_: object) -> dict:
        made.append(trial)
        flags = trial.flags
        worst = abs(math.log2(flags["learning_rate"] / 2e-3)) + abs(flags["batch_size"] - 4)
        score = 2 + 0.1 * worst - 0.3 * math.log2(trial.tokens / 1000) + 0.001 * trial.seed
        ours = trial.recipe == "ours"
        found = {"bits_per_byte": score - 0.15 * ours, "seconds": 10.0 + 2 * ours}
        return found | {"repeated_4grams": 0.25}

    monkeypatch.setattr(compare_recipes, "run_trial", run_trial)
    args = argparse.Namespace(json=tmp_path / "runs.json", device="cpu", seeds=[1, 2], rounds=1)
    return Contest(args, tmp_path, InThisProcess(), {}, "code"), made


def test_a_sweep_finds_the_best_and_no_run_is_made_twice(
    contest: tuple[Contest, list[Trial]],
) -> None:
    ring, made = contest
    best = ring.best("plain Muon", 1000)
    assert (best["learning_rate"], best["batch_size"]) == (2e-3, 4)
    assert len(made) == len({t.key("code") for t in made})
    before = len(made)
    assert ring.best("plain Muon", 1000) == best and len(made) == before
    kept = json.loads(ring.args.json.read_text())
    again = Contest(ring.args, ring.folder, ring.pool, kept, "code")
    assert again.best("plain Muon", 1000) == best and len(made) == before
    other = Contest(ring.args, ring.folder, ring.pool, kept, "other code")
    assert other.best("plain Muon", 1000) == best and len(made) == 2 * before


def test_the_table_tells_the_share_of_the_opponent_s_tokens(
    contest: tuple[Contest, list[Trial]],
) -> None:
    """Ours is as good with half a doubling fewer: 0.15 of 0.3 bits/byte."""
    ring, _ = contest
    flags = {"learning_rate": 2e-3, "batch_size": 4}
    lines = [*compare_recipes.rows_of(ring, 1000, {"plain Muon": flags, "ours": flags})]
    ours, muon = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert muon[4].startswith("2.0015 ±") and ours[4].startswith("1.8515 ±")
    mean, _, deviation = muon[5].split()
    assert float(mean) == pytest.approx(2**-0.5, abs=2e-3) and float(deviation) < 0.01
    assert float(muon[6]) == pytest.approx(2**-0.5 * 1.2, abs=0.01), "and takes longer for each"
    assert float(muon[7]) == pytest.approx(0.15 / 0.0007071, rel=0.01)
    assert ours[5:8] == [""] * 3 and muon[8] == "0.2500 ± 0.0000"


def test_an_opponent_that_is_better_is_told_so(contest: tuple[Contest, list[Trial]]) -> None:
    ring, _ = contest
    chosen = {"plain Muon": {"learning_rate": 2e-3, "batch_size": 4}}
    chosen["ours"] = {"learning_rate": 8e-3, "batch_size": 4}
    _, muon = compare_recipes.rows_of(ring, 1000, chosen)
    assert "| over 1 | inf | -" in muon


def test_ablations_bring_no_other_opponent() -> None:
    names = compare_recipes.with_ablations(["ours, no warm-up", "ours"])
    assert names[:2] == ["ours, no warm-up", "ours"] and len(names) == len(set(names))
    assert {*names} == {"ours", *(n for n in compare_recipes.recipes(False) if ", " in n)} - {
        "MiniMind, padded",
        "AdamW, packed",
        "torch's Muon, its defaults",
    }


def test_a_sweep_leaves_out_what_the_program_refuses() -> None:
    assert compare_recipes.fits({"warmup_ratio": 0.1, "decay_ratio": 0.85})
    assert not compare_recipes.fits({"warmup_ratio": 0.2, "decay_ratio": 0.85})


def test_a_worker_has_its_share_of_the_cores() -> None:
    before = torch.get_num_threads()
    try:
        compare_recipes.start_worker(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_each_part_of_the_best_recipe_is_left_out_once() -> None:
    """What changes in an ablation is a part of it, or the rate and rows that are swept."""
    best = RECIPES["best"]
    left_out = {name for change in compare_recipes.ABLATIONS.values() for name in change}
    swept = {"learning_rate", "batch_size", "accumulation_steps"}
    same_for_all = {"optimizer", "lr_schedule", "adam_beta1", "adam_beta2"}
    assert left_out <= best.keys() and best.keys() - left_out <= swept | same_for_all
    for recipe in compare_recipes.recipes(False).values():
        parse_flags(words(recipe.flags | {"device": "cpu"}))
