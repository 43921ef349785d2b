"""trainer/forecast.py: the expected end of a run, against independent formulas and real runs."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from bench import forecast_runs
from dataset.lm_dataset import PretrainDataset
from tests.helpers import shipped_tokenizer
from tests.running import (
    read_metrics,
    short_documents,
    train_in_process,
    train_on_ranks,
    write_corpus,
)
from trainer import forecast
from trainer.bigrams import count_pairs, nats_of_pairs
from trainer.command_line import parse_flags
from trainer.forecast import (
    EXPONENT,
    FEW_SENTENCES,
    FROM_COUNTS,
    FROM_RANDOM,
    PAIRS,
    Forecast,
    Prior,
    combined,
    law_of,
    losses_of,
    priors_for,
    rate_of,
)
from trainer.run import Run

ROOT = Path(__file__).resolve().parents[1]
WSD = rate_of("wsd", 0.05, 0.85)
RUNS = json.loads((ROOT / "docs" / "bands" / "forecast_runs.json").read_text())


def losses(a: float, b: float, shares: list[float], end: float = 2.0) -> list[tuple[float, float]]:
    """Losses that follow the law to the last digit, and reach ``end``."""
    return [
        (share, end * math.exp(a * fallen + b * rate))
        for share, (fallen, rate) in zip(shares, law_of(WSD, shares), strict=True)
    ]


def test_the_sum_of_a_schedule_is_its_area() -> None:
    """A triangle of the warm-up and one of the decay, from 0.15 on; their sum is 0.525."""
    for share, area in ((0.05, 0.025), (0.15, 0.125), (1.0, 0.55)):
        ((fallen, rate),) = law_of(WSD, [share])
        assert fallen == pytest.approx((area / 0.55) ** -EXPONENT - 1, rel=1e-3)
        assert rate == pytest.approx(WSD(share))
    half = 0.125 + 0.85 * (1 - (0.5 / 0.85) ** 2) / 2  # of the decay, what is left is a triangle
    ((fallen, _),) = law_of(WSD, [0.5])
    assert fallen == pytest.approx((half / 0.55) ** -EXPONENT - 1, rel=2e-3)


@pytest.mark.parametrize("prior", [FROM_RANDOM, FROM_COUNTS])
def test_a_run_that_follows_the_law_ends_as_foretold(prior: Prior) -> None:
    shares = [i / 20 for i in range(1, 21)]
    points = losses(prior.a, prior.b, shares)
    widths = []
    for known in (4, 10, 16):
        found = forecast.forecast(points[:known], [], WSD, [prior])
        assert found is not None
        assert found.expected == pytest.approx(2.0, rel=1e-3)
        assert found.low < 2.0 < found.high
        # With half of its tokens, the same law: S is half as large.
        assert found.half == pytest.approx(2 * math.exp(prior.a * (0.5**-0.3 - 1)), rel=5e-3)
        assert found.twice == pytest.approx(2 * math.exp(prior.a * (2**-0.3 - 1)), rel=5e-3)
        widths.append(found.high - found.low)
    assert widths[0] > widths[1] > widths[2]


def test_what_losses_say_is_weighed_as_in_bayes_rule() -> None:
    """Without correlated noise the law is a linear regression: precisions add up."""
    prior = Prior(0.2, 0.05, 0.01, -0.001, 0.002, left_over=0.0)
    shares = [0.2, 0.3, 0.4, 0.5]
    points = [(x, y * (1 + 2e-3 * (-1) ** i)) for i, (x, y) in enumerate(losses(0.3, 0.02, shares))]
    found = forecast.forecast(points, [], WSD, [prior])
    assert found is not None

    law = torch.tensor(law_of(WSD, shares), dtype=torch.float64)
    features = torch.cat((torch.ones(4, 1, dtype=torch.float64), law), 1)
    before = torch.zeros(3, 3, dtype=torch.float64)
    before[1:, 1:] = torch.tensor([[0.01, -0.001], [-0.001, 0.002]]).double().inverse()
    before[0, 0] = 1 / forecast.UNKNOWN
    precision = before + features.T @ features / forecast.SCORE_NOISE**2
    y = torch.tensor([y for _, y in points], dtype=torch.float64).log()
    means = before @ torch.tensor([0.0, 0.2, 0.05]).double()
    height, slope, _ = torch.linalg.solve(
        precision, means + features.T @ y / forecast.SCORE_NOISE**2
    )
    deviation = math.sqrt(precision.inverse()[0, 0])
    assert found.expected == pytest.approx(math.exp(height), rel=1e-6)
    assert found.high == pytest.approx(math.exp(height + 1.645 * deviation), rel=1e-5)
    assert found.low == pytest.approx(math.exp(height - 1.645 * deviation), rel=1e-5)
    assert found.twice == pytest.approx(math.exp(height + slope * (2**-0.3 - 1)), rel=1e-4)


def test_training_losses_tell_of_the_fall_whatever_their_height() -> None:
    shares = [i / 40 for i in range(1, 9)]
    points = losses(0.35, 0.02, shares)
    few = points[-1:]
    guessed = forecast.forecast(few, [], WSD, [FROM_RANDOM])
    told = forecast.forecast(few, [(x, 3.7 * y) for x, y in points], WSD, [FROM_RANDOM])
    assert guessed is not None and told is not None
    assert abs(told.expected - 2) < 0.6 * abs(guessed.expected - 2)
    assert told.high - told.low < guessed.high - guessed.low


def test_a_text_of_another_kind_is_noticed() -> None:
    """One made of few sentences, as the demo's, falls four times as far."""
    shares = [i / 20 for i in range(1, 8)]
    easy = losses(FEW_SENTENCES.a, FEW_SENTENCES.b, shares)
    found = forecast.forecast(easy, [], WSD, priors_for(True))
    assert found is not None and found.expected == pytest.approx(2, rel=0.05)
    alone = forecast.forecast(easy, [], WSD, [FROM_RANDOM])
    assert alone is not None and abs(alone.expected - 2) > 2 * abs(found.expected - 2)


def test_records_become_points() -> None:
    records = [
        {"step": 1, "loss": 9.0, "rows": 4},  # of a version that did not note its progress
        {"step": 2, "loss": 8.0, "rows": 8, "progress": 0.1},
        {"step": 2, "heldout_bits_per_byte": 3.0, "progress": 0.1},
        {"step": 4, "loss": 7.0, "rows": 16, "progress": 0.2},
        {"step": 6, "loss": 6.0, "rows": 24, "progress": 0.3},  # the second pass
        {"step": 6, "rows": 24, "progress": 0.3},  # all its updates were left out
        {"step": 6, "heldout_bits_per_byte": 2.5, "progress": 0.3},
    ]
    held_out, training = losses_of(records, 20)
    assert held_out == [(0.1, 3.0), (0.3, 2.5)]
    assert training == [(0.05, 8.0), (pytest.approx(0.15), 7.0)]
    assert forecast.forecast(held_out[:1], training, WSD, [FROM_RANDOM]) is None  # too early
    assert forecast.forecast([], training, WSD, [FROM_RANDOM]) is None


def test_two_forecasts_are_weighed_by_what_they_know() -> None:
    """Nine of ten draws of two correlated errors lie within the range, and closer than either."""
    torch.manual_seed(0)
    widths = torch.tensor([0.03, 0.02])
    both = torch.tensor([[1.0, forecast.IN_COMMON], [forecast.IN_COMMON, 1.0]])
    errors = torch.randn(4000, 2) @ torch.linalg.cholesky(both).T * widths
    inside, off = 0, []
    for pair in errors.tolist():
        two = [
            Forecast(*(2 * math.exp(x + z * width) for z in (-1.645, 0, 1.645)), 2.2, 1.8)
            for x, width in zip(pair, widths.tolist(), strict=True)
        ]
        found = combined(*two)
        inside += found.low <= 2 <= found.high
        off.append(math.log(found.expected / 2))
        assert found.half == pytest.approx(2.2) and found.twice == pytest.approx(1.8)
    assert inside / len(off) == pytest.approx(0.9, abs=0.015)
    assert torch.tensor(off).std() < 0.99 * widths.min()
    precise = Forecast(1.99, 2.0, 2.01, 2.1, 1.9)  # the other would make it worse
    assert combined(precise, two[1]) == pytest.approx(precise, rel=1e-4)


def test_what_pairs_tell_counts_for_ordinary_text_alone() -> None:
    known = forecast.forecast_by_pairs(2.5, 10**6, 10**6)
    assert known is not None
    assert known.expected == pytest.approx(2.5 * math.exp(forecast.BELOW_PAIRS[0]))
    shares = [i / 20 for i in range(1, 8)]
    ordinary = losses(FROM_COUNTS.a, FROM_COUNTS.b, shares)
    easy = losses(FEW_SENTENCES.a, FEW_SENTENCES.b, shares)
    priors = priors_for(False)
    alone, both = (forecast.forecast(ordinary, [], WSD, priors, k) for k in (None, known))
    assert alone is not None and both is not None
    assert alone.expected < both.expected < known.expected
    assert both.high / both.expected < min(f.high / f.expected for f in (alone, known))
    assert forecast.forecast(easy, [], WSD, priors) == forecast.forecast(
        easy, [], WSD, priors, known
    )


@pytest.mark.parametrize("score", [0.0, -1.0, math.inf, math.nan, "2.5", None])
def test_a_score_of_pairs_that_makes_no_sense_is_as_none(score: object) -> None:
    run = SimpleNamespace(records=[{"step": 0, PAIRS: score}, {"step": 0}], pairs=None)
    assert forecast.score_of_pairs(cast(Run, run), None) is None


def test_pairs_of_more_or_less_text_than_the_run_sees_tell_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With --max_minutes a run may see a part of what was counted, or all of it several times."""
    monkeypatch.setattr(forecast, "weights_in_layers", lambda model: 1e6)
    words = ["--preset", "demo", "--recipe", "best", "--max_seq_len", "100"]

    def told(passes: float, *more: str) -> bool:
        args = parse_flags([*words, *more])
        run = cast(Run, SimpleNamespace(args=args, model=None, rows_per_epoch=10_000))
        return forecast.forecast_from_pairs(run, 2.5, passes * 10**6) is not None

    assert told(1) and told(1.01)
    assert not told(0.15) and not told(2)
    assert not told(1, "--packing", "0") and not told(1, "--recipe", "minimind")


def test_nothing_is_told_by_pairs_of_sizes_that_nobody_measured() -> None:
    for tokens, weights in ((9e4, 1e6), (2e7, 1e6), (1e6, 1e5), (1e6, 5.9e7)):
        assert forecast.forecast_by_pairs(2.5, tokens, weights) is None


def test_the_law_of_pairs_is_what_the_runs_say() -> None:
    """Its numbers, and that they hold: a run left out of the fit ends where the others say."""
    folder = ROOT / "docs" / "bands"
    fitted = [run for run in RUNS if not run["apart"]]
    ends = forecast_runs.ends_of(fitted) + json.loads((folder / "contest_ends.json").read_text())
    (line,) = forecast_runs.below_pairs(ends)
    assert f"({', '.join(f'{n:.4f}' for n in forecast.BELOW_PAIRS)})" in line
    off = []
    for i, end in enumerate(ends):
        (line,) = forecast_runs.below_pairs(ends[:i] + ends[i + 1 :])
        numbers = [float(n) for n in re.findall(r"-?\d\.\d{4}", line)][:-1]
        features = forecast.features_of(end["tokens"], end["weights"])
        told = math.log(end["pairs"]) + sum(a * b for a, b in zip(numbers, features, strict=True))
        off.append(abs(told - math.log(end["end"])))
    inside = sum(one <= forecast.QUANTILE * forecast.PAIRS_LEFT_OVER for one in off)
    assert len(ends) > 30 and inside >= 0.9 * len(ends)


# ------------------------------------------------------------------------------------- real runs


@pytest.mark.parametrize("share", forecast_runs.SHARES)
def test_nine_of_ten_runs_end_where_it_was_foretold(share: float) -> None:
    """Runs that the priors were not fitted to; docs/RECIPES.md says how they were made."""
    found = [forecast_runs.errors(run, share) for run in forecast_runs.apart(RUNS)]
    known = [pair for pair in found if pair]
    assert len(known) >= 9
    assert sum(inside for _, inside in known) >= 0.9 * len(known)


def test_the_program_that_makes_such_runs_makes_them(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "corpus.jsonl", short_documents(400))
    flags = {"hidden_size": 16, "num_hidden_layers": 1, "seed": 1, "batch_size": 1}
    made = forecast_runs.make(flags | {"tokens": 9000, "text": text}, tmp_path)
    assert made["schedule"] == ["wsd", 0.05, 0.9]
    shares, scores = zip(*made["held_out"], strict=True)
    assert len(shares) > 10 and list(shares) == sorted(shares) and shares[-1] == 1
    assert scores[-1] < scores[0] and made["training"][-1][1] < made["training"][0][1]
    assert forecast_runs.errors(made, 0.5) is not None


def test_a_run_tells_its_end_from_15_percent_on(tmp_path: Path) -> None:
    changes = {"epochs": 4, "eval_interval": 4, "heldout_fraction": 0.2, "lr_schedule": "wsd"}
    said = train_in_process(tmp_path / "one", **changes)
    records = [r for r in read_metrics(tmp_path / "one") if "heldout_bits_per_byte" in r]
    for record in records:
        foretold = "forecast_expected" in record
        assert foretold == (0.15 <= record["progress"] < 1), record
        if foretold:
            low, expected, high = (record[f"forecast_{k}"] for k in ("low", "expected", "high"))
            assert 0 < low < expected < high
            assert record["forecast_twice"] <= expected <= record["forecast_half"]
    lines = re.findall(
        r"forecast: ([\d.]+) bits/byte at the end, in nine of ten runs between ([\d.]+) and "
        r"([\d.]+); about ([\d.]+) with half of the tokens, ([\d.]+) with twice as many",
        said,
    )
    names = ("expected", "low", "high", "half", "twice")
    told = [r for r in records if "forecast_expected" in r]
    assert len(lines) == len(told) > 3
    for line, record in zip(lines, told, strict=True):
        assert [*map(float, line)] == [record[f"forecast_{name}"] for name in names]

    train_on_ranks(tmp_path / "two", 2, accumulation_steps=2, **changes)
    again = [r for r in read_metrics(tmp_path / "two") if "forecast_expected" in r]
    for a, b in zip(told, again, strict=True):
        assert a["forecast_expected"] == pytest.approx(b["forecast_expected"], abs=2e-3)


def test_a_run_that_began_with_counts_goes_by_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "MEASURED_TOKENS", (1e3, 1e7))
    monkeypatch.setattr(forecast, "MEASURED_WEIGHTS", (1e3, 1e7))
    # The corpus has few sentences.
    monkeypatch.setattr(forecast, "priors_for", lambda at_random: [FROM_COUNTS])
    changes = {"recipe": "best", "epochs": 1, "eval_interval": 2, "batch_size": 2}
    said = train_in_process(tmp_path / "whole", **changes)
    records = read_metrics(tmp_path / "whole")
    told = [r for r in records if "forecast_expected" in r]
    assert list(records[0]) == ["step", PAIRS] and len(told) > 3
    score = records[0][PAIRS]
    assert f"held out: {score:.4f} bits/byte by counts of neighbouring tokens alone" in said
    assert score == pytest.approx(independent_score_of_pairs(tmp_path / "whole"))

    asked = []
    monkeypatch.setattr(forecast, "forecast_by_pairs", lambda *given: asked.append(given))
    train_in_process(tmp_path / "without", **changes)
    without = [r for r in read_metrics(tmp_path / "without") if "forecast_expected" in r]
    assert {pairs for pairs, *_ in asked} == {score} and len(without) == len(told)
    pairs = [*zip(told, without, strict=True)]
    assert all(one["heldout_loss"] == other["heldout_loss"] for one, other in pairs)
    assert any(one["forecast_expected"] != other["forecast_expected"] for one, other in pairs)


# ------------------------------------------------------------------------------------- dry runs


def independent_score_of_pairs(folder: Path) -> float:
    """Held-out bits per byte by counts of pairs, of a run's corpus."""
    data = PretrainDataset(
        str(folder / "corpus.jsonl"),
        shipped_tokenizer(),
        32,
        heldout_fraction=0.1,
        cache_dir=str(folder / "cache"),
    )
    held_out = data.held_out(10**6)
    assert held_out is not None
    counts = count_pairs([data.__getitems__([*range(len(data))])], 6400)
    nats = nats_of_pairs(counts, [held_out.__getitems__([*range(len(held_out))])])
    return nats / math.log(2) / held_out.num_text_bytes


def dry_run(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> str:
    """What it says of the loss."""
    monkeypatch.setattr(forecast, "MEASURED_TOKENS", (1e3, 1e7))
    monkeypatch.setattr(forecast, "MEASURED_WEIGHTS", (1e3, 1e7))
    said = train_in_process(folder, dry_run=1, **changes)
    (line,) = re.findall(r"dry run: (.*(?:end|foretold).*)", said)
    return line


def test_a_dry_run_of_the_best_recipe_tells_the_loss_from_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = dry_run(tmp_path, monkeypatch, recipe="best", epochs=1)
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", line)]
    expected, low, high, half, twice, pairs = numbers
    assert low < expected < high < pairs * 1.2
    assert high / expected == pytest.approx(expected / low, rel=1e-3)
    assert pairs == pytest.approx(independent_score_of_pairs(tmp_path), abs=1e-4)
    assert (half > expected > twice) or half == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("changes", [{"epochs": 2, "recipe": "best"}, {"epochs": 1}])
def test_a_dry_run_of_what_was_not_measured_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    assert dry_run(tmp_path, monkeypatch, **changes).startswith("its loss is foretold from 15%")
