"""The arithmetic of the comparison of recipes; its runs are too long for a test."""

import argparse
import math
from pathlib import Path

import pytest

from bench.compare_recipes import HELD_OUT, Trial, needed, report, split


def curve(name: str, minutes: float, *points: tuple[float, int, float], seed: int = 1) -> Trial:
    """A run whose looks gave these seconds, tokens and bits per byte."""
    return Trial(
        name,
        {},
        minutes,
        seed,
        name.startswith("padded"),
        [
            {"seconds": s, "tokens": t, "updates": i, "bits_per_byte": b}
            for i, (s, t, b) in enumerate(points, 1)
        ],
    )


def test_what_a_curve_needs_lies_between_its_looks() -> None:
    trial = curve("ours", 2, (10, 1000, 3.0), (40, 4000, 2.0), (120, 9000, 1.5))
    assert needed(trial, 3.5, "seconds") == 10, "not earlier than the first look"
    assert needed(trial, 2.0, "tokens") == pytest.approx(4000)
    assert needed(trial, 2.5, "seconds") == pytest.approx(math.sqrt(10 * 40))
    assert needed(trial, 1.4, "seconds") == math.inf


def test_the_report_compares_with_the_padded_recipe_s_mean() -> None:
    padded = [
        curve("padded, rate 0.002", 20, (1200, 80_000, b), seed=s)
        for s, b in enumerate((2.6, 2.8), 1)
    ]
    ours = [curve("ours", 2, (120, 20_000, b), seed=s) for s, b in enumerate((2.5, 2.75), 1)]
    ours += [curve("ours", 20, (60, 10_000, 3.0), (1200, 90_000, 2.0))]
    lines = report(argparse.Namespace(minutes=20.0), padded, ours).splitlines()
    short = next(line for line in lines if line.startswith("| ours | 2 |"))
    assert "2.5000, 2.7500 | 0.25 | 0.10 | no |" in short, "one seed is worse than 2.7"
    assert "| 2.0000 | 1.12 | 1.00 | yes |" in next(x for x in lines if x.startswith("| ours | 20"))
    assert "passed the padded recipe's 2.7000 within" in lines[-1]
    between = math.exp(0.7 * math.log(60) + 0.3 * math.log(1200))  # 0.3 of the way down
    assert f"within {between / 1200:.3f} of its seconds" in lines[-1]


def test_the_last_documents_are_kept_aside(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(100)))
    trained, kept = split(corpus, tmp_path)
    assert len(kept.read_bytes().splitlines()) == round(100 * HELD_OUT)
    assert trained.read_bytes() + kept.read_bytes() == corpus.read_bytes()
    assert kept.read_bytes().endswith(b'{"text": "99"}\n')
