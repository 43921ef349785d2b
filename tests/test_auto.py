"""--recipe best, and what --learning_rate auto and --batch_size auto choose and keep."""

import dataclasses
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dataset.lm_dataset import Batch
from model.model_minimind import MiniMindForCausalLM
from tests.helpers import tiny_config
from tests.running import (
    assert_same,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
    train_and_kill,
    train_in_process,
    train_on_ranks,
    training_command,
)
from trainer.auto import (
    FEWEST_UPDATES,
    PassTimes,
    best_learning_rate,
    best_update_tokens,
    choose,
    muon_tokens,
    pass_times,
)
from trainer.command_line import parse_flags
from trainer.errors import CheckpointError, SettingsError
from trainer.flags import AUTO, PRESETS, RECIPES
from trainer.optimizer import Tuning, build_optimizer, set_lr
from trainer.weights import get_model_params

# Step Law for 59 M weights, worked out by hand from its published constants.
PUBLISHED = [(0.125e9, 1.6e-3, 24e3), (0.5e9, 2.4e-3, 54e3), (2.2e9, 3.8e-3, 125e3)]
BOTH = {"learning_rate": "auto", "batch_size": "auto"}


def never() -> PassTimes:
    raise AssertionError("a CPU's speed is needed only if time is what is given")


def chosen(
    words: str, rows: int, times: object = never, device: str = "cpu", **sizes: object
) -> object:
    model = MiniMindForCausalLM(tiny_config(**sizes))
    args = parse_flags(["--device", "cpu", *words.split()])
    return choose(dataclasses.replace(args, device=device), model, rows, None, times)


# Weights in layers and tokens of runs; the lowest and the highest rate that ended within 0.5 % of
# the best, for four rows of 340 tokens an update: docs/RECIPES.md.
MEASURED = [
    (0.84e6, 150e3, 3.0e-3, 6.5e-3),
    (0.84e6, 300e3, 3.0e-3, 6.5e-3),
    (0.84e6, 600e3, 3.0e-3, 4.5e-3),
    (3.34e6, 150e3, 3.0e-3, 3.4e-3 * 2**0.5),  # 3.4e-3 with two rows
    (3.34e6, 300e3, 2.0e-3, 4.5e-3),
    (3.34e6, 600e3, 2.0e-3, 4.5e-3),
    (13.4e6, 150e3, 3.0e-3, 4.5e-3),
    (13.4e6, 300e3, 2.0e-3, 4.5e-3),
    (13.4e6, 600e3, 2.0e-3, 3.0e-3),
]


@pytest.mark.parametrize(("tokens", "rate", "update"), PUBLISHED)
def test_the_rules_of_adamw_are_those_published(tokens: float, rate: float, update: float) -> None:
    assert best_learning_rate("adamw", 59e6, tokens) == pytest.approx(rate, rel=0.04)
    assert best_update_tokens(tokens) == pytest.approx(update, rel=0.04)


@pytest.mark.parametrize(("weights", "tokens", "lowest", "highest"), MEASURED)
def test_muon_s_rate_is_one_that_was_measured_to_do_well(
    weights: float, tokens: float, lowest: float, highest: float
) -> None:
    larger = 4 * 340 / best_update_tokens(tokens)
    assert lowest < best_learning_rate("muon", weights, tokens) * larger**0.5 < highest


def test_weights_of_embedding_and_head_do_not_count() -> None:
    layers = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32 + 2 * 8) + 32
    for tied in (True, False):
        words = "--learning_rate auto --batch_size auto --accumulation_steps 1 --max_seq_len 100"
        args = chosen(words, 20_000, tie_word_embeddings=tied)
        expected = best_learning_rate("adamw", layers, 2e6)
        assert args.learning_rate == pytest.approx(expected, rel=0.03)
        assert args.batch_size == round(best_update_tokens(2e6) / 100 / 8) * 8
    model = MiniMindForCausalLM(tiny_config())
    assert get_model_params(model, model.config)[1] == layers + 96 * 32


def test_a_larger_update_than_suits_gets_a_higher_rate() -> None:
    words, sizes = "--learning_rate auto --accumulation_steps 1 --batch_size", {"hidden_size": 256}
    rates = [chosen(f"{words} {rows}", 10**4, **sizes).learning_rate for rows in (1, 4)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.1)


@pytest.mark.parametrize("experts", [0, 4])
def test_an_update_is_large_enough_for_what_muon_multiplies(experts: int) -> None:
    """Against torch's own count of operations, over the updates in which each matrix moves once."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512}
    if experts:
        sizes |= {"use_moe": True, "num_experts": experts}
    model = MiniMindForCausalLM(tiny_config(**sizes))
    tuning, ids = Tuning(muon_period=2), torch.arange(512).view(8, 64)
    optimizer = build_optimizer(model, 1e-3, "muon", tuning=tuning)
    with FlopCounterMode(display=False) as passes:
        model(ids, labels=ids).loss.backward()
    with FlopCounterMode(display=False) as two_steps:
        for update in range(2):
            set_lr(optimizer, 1e-3, update)
            optimizer.step()
    per_token = passes.get_total_flops() / ids.numel()
    if experts:  # whose products it does not count
        per_token = 6 * (get_model_params(model, model.config)[1])
    tokens = muon_tokens(model, 2)
    assert muon_tokens(model, 1) == 2 * tokens
    operations = two_steps.get_total_flops() / 2
    assert operations / (tokens * per_token) == pytest.approx(0.25, rel=0.03)

    words, rows = "--recipe best --max_seq_len 8", 10**6 if experts else 20_000
    wanted = max(tokens, best_update_tokens(8 * rows))
    assert chosen(words, rows, **sizes).batch_size * 8 == pytest.approx(wanted, rel=0.1)
    plain = chosen(f"{words} --optimizer adamw", rows, **sizes)
    assert plain.batch_size * 8 == pytest.approx(best_update_tokens(8 * rows), rel=0.1)


def test_a_time_counts_as_what_fits_into_it() -> None:
    times = PassTimes(2.5, 2.5)
    by_time = chosen("--recipe best --max_minutes 1000 --max_seq_len 100", 50, lambda: times)
    by_rows = chosen("--recipe best --max_seq_len 100", round(0.8 * 60_000 * 0.4))
    assert (by_time.learning_rate, by_time.batch_size) == (
        by_rows.learning_rate,
        by_rows.batch_size,
    )


def test_few_updates_are_not_made_fewer() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512}
    rows = 5 * FEWEST_UPDATES
    assert muon_tokens(MiniMindForCausalLM(tiny_config(**sizes)), 1) > 100 * 5
    args = chosen("--recipe best --muon_period 1 --max_seq_len 100", rows, **sizes)
    best = best_update_tokens(100 * rows)
    assert args.batch_size == max(5, round(best / 100))


@pytest.mark.parametrize("least", [0.001, 0.02])
def test_an_update_keeps_an_accelerator_busy_while_it_is_launched(least: float) -> None:
    """Launching takes 20 ms, each row 0.1 ms: 400 rows last twice as long, a power of two holds."""
    times = PassTimes(least, 1e-4)
    words = "--batch_size auto --accumulation_steps 1 --max_seq_len 128 --learning_rate auto"
    args = chosen(words, 400_000, lambda: times, device="cuda")
    best = best_update_tokens(128 * 400_000)
    wanted = max(2 ** math.ceil(math.log2(2 * least / 1e-4 * 128)), best)
    assert args.batch_size * 128 == pytest.approx(wanted, rel=0.05)
    noisy = PassTimes(1.2 * least, 1e-4)
    assert chosen(words, 400_000, lambda: noisy, device="cuda").batch_size == args.batch_size
    assert chosen(words, 400_000).batch_size == pytest.approx(best / 128, rel=0.1)


class OnlySoManyRows:
    """A dataset whose batches need more memory than there is, from some number of rows on."""

    def __init__(self, most: int) -> None:
        self.most, self.row_length, self.asked = most, 32, []

    def __len__(self) -> int:
        return 1000

    def __getitems__(self, rows: list[int]) -> object:
        self.asked.append(len(rows))
        if len(rows) > self.most:
            raise torch.OutOfMemoryError("no room for this many rows")
        ids = torch.ones(len(rows), 32, dtype=torch.int64)
        return Batch(ids, ids, None, 31 * len(rows))


@pytest.mark.parametrize(("most", "timed"), [(128, 128), (100, 32), (1, 1)])
def test_a_pass_is_timed_on_as_many_rows_as_memory_has_room_for(most: int, timed: int) -> None:
    data = OnlySoManyRows(most)
    times = pass_times(MiniMindForCausalLM(tiny_config()), data, nullcontext())
    assert data.asked[:2] == [1, 128] and data.asked[-1] == max(timed, 2)
    assert 0 < times.each_row <= times.least and (times.each_row < times.least) == (most > 1)


@pytest.mark.parametrize("words", ["--learning_rate -1", "--batch_size -1", "--batch_size 0"])
def test_only_the_word_means_it(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, SettingsError)) as raised:
        parse_flags(words.split())
    said = capsys.readouterr().err + str(raised.value)
    assert words.split()[0] in said and ("or auto" in said or "expected 1 " in said), said


def test_a_recipe_is_a_set_of_defaults() -> None:
    """Above the preset's, and below what is given."""
    demo = parse_flags(["--preset", "demo"])
    assert vars(demo) | {"recipe": "minimind"} == vars(demo), "MiniMind's is the default"
    best = parse_flags(["--preset", "demo", "--recipe", "best", "--learning_rate", "0.5"])
    changed = {name for name in vars(best) if getattr(best, name) != getattr(demo, name)}
    assert changed - {"recipe", "learning_rate"} <= RECIPES["best"].keys()
    assert best.learning_rate == 0.5 and best.batch_size == AUTO
    assert best.epochs == PRESETS["demo"]["epochs"]


def test_a_killed_run_goes_on_to_the_last_bit_with_what_it_chose(tmp_path: Path) -> None:
    settings = {"recipe": "best", **BOTH, "accumulation_steps": 1, "max_seq_len": 64}
    log = train_in_process(tmp_path / "whole", **settings)
    said = re.search(r"auto: --learning_rate (\S+), (\d+) rows", log)
    train_and_kill(tmp_path / "cut", 7, **settings)
    assert "auto:" not in train_in_process(tmp_path / "cut", **settings, from_resume=1)
    state = newest_state(tmp_path / "cut")
    assert_same(state, newest_state(tmp_path / "whole"))
    kept = state["settings"]["learning_rate"], state["settings"]["rows per update"]
    assert said and kept == (float(said[1]), int(said[2]))
    given = settings | dict(zip(("learning_rate", "batch_size"), kept, strict=True))
    train_in_process(tmp_path / "given", **given)
    assert_same(newest_state(tmp_path / "given")["model"], state["model"])


def test_on_other_ranks_the_update_stays_the_same(tmp_path: Path) -> None:
    settings = BOTH | {"accumulation_steps": 1, "max_seq_len": 12, "save_interval": 2}
    train_in_process(tmp_path, **settings, epochs=1)
    rows = newest_state(tmp_path)["settings"]["rows per update"]
    assert rows % 2 == 0 and rows % 3
    train_and_kill(tmp_path / "cut", 7, **settings, epochs=1)
    log = train_on_ranks(tmp_path / "cut", 2, **settings, epochs=1, from_resume=1)
    assert "except for rounding" in log
    records = [read_metrics(tmp_path / name) for name in (".", "cut")]
    one, two = ([r["loss"] for r in found if "loss" in r][-1] for found in records)
    assert two == pytest.approx(one, rel=1e-4)
    words = tiny_flags(tmp_path / "cut", **settings | {"accumulation_steps": 3}, from_resume=1)
    done = run_command(training_command(words))
    assert done.returncode == 2
    assert "does not divide among 1 ranks x 3 --accumulation_steps" in done.stderr


def test_a_state_that_lies_about_them_is_refused() -> None:
    model = MiniMindForCausalLM(tiny_config())
    args = parse_flags(["--device", "cpu", "--recipe", "best"])
    for lie in ({}, {"learning_rate": "1", "rows per update": 4}, {"learning_rate": 1.0}):
        with pytest.raises(CheckpointError, match="learning rate"):
            choose(args, model, 100, {"settings": lie}, never)
