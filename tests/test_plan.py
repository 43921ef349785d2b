"""Runs that are planned by time. The clock is made up: an update takes as long as a test says."""

import contextlib
import io
import random
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import train_pretrain
from tests.running import (
    assert_same,
    files_with_times,
    newest_state,
    read_metrics,
    tiny_flags,
    train_in_process,
)
from trainer.checkpoint import list_states, update_of
from trainer.guard.run_folder import read_run_state
from trainer.plan import NOT_KNOWN, Budget, Plan


class Clock:
    """Seconds that pass when it is told so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def during(self, work: object, seconds: object) -> object:
        """``work`` as before, but it takes ``seconds``, a number or what gives one."""

        def lasting(*args: object, **kwargs: object) -> object:
            self.now += seconds() if callable(seconds) else seconds
            return work(*args, **kwargs)

        return lasting


def test_a_changed_plan_goes_on_where_the_old_one_was() -> None:
    plan = Plan(1000)
    assert [plan.share(rows) for rows in (0, 250, 1000)] == [0, 0.25, 1]
    for rows, total in ((100, 5000), (300, 400), (390, 390)):
        share = plan.share(rows)
        plan = plan.changed(rows, total)
        assert plan.share(rows) == pytest.approx(share) or total == rows
        assert plan.share(total) == pytest.approx(1) or total == rows
    assert Plan(10).changed(7, 3).total_rows == 7, "never less than what was seen"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The program's budget goes by this clock; an evaluation takes 9 s, a save 2 s."""
    clock = Clock()
    begun = {"clock": clock}
    monkeypatch.setattr(
        train_pretrain, "Budget", lambda seconds: Budget(seconds, begun=clock(), **begun)
    )
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(train_pretrain, "evaluate", clock.during(train_pretrain.evaluate, 9))
    monkeypatch.setattr(train_pretrain.Run, "save", clock.during(train_pretrain.Run.save, 2))
    return clock


def took(clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: object) -> None:
    step = clock.during(train_pretrain.train_step, seconds)
    monkeypatch.setattr(train_pretrain, "train_step", step)


def speeds(kind: str) -> Iterator[float]:
    """Seconds of each update."""
    draw, n = random.Random(0), 0
    while True:
        n += 1
        if kind == "steady":
            yield 0.5 if n > 1 else 20.0  # the first compiles
        elif kind == "noisy":
            yield 0.5 * draw.choice([0.7, 1, 1, 1, 3])
        else:
            yield 0.4 if n < 200 else 1.1  # another program came to the machine


SETTINGS = {"lr_schedule": "wsd", "log_interval": 10, "save_interval": 60, "eval_interval": 100}
SETTINGS |= {"batch_size": 1, "accumulation_steps": 1}


@pytest.mark.parametrize("kind", ["steady", "noisy", "slower"])
def test_a_run_ends_when_its_time_is_over_with_its_rate_at_the_floor(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    took(clock, monkeypatch, partial(next, speeds(kind)))
    begun = clock()
    train_in_process(tmp_path, **SETTINGS, max_minutes=5)
    assert clock() - begun == pytest.approx(300, rel=0.02)
    rates = [r["lr"] for r in read_metrics(tmp_path) if "lr" in r]
    peak = max(rates)
    assert rates.index(peak) == 0 and rates[-1] < 0.02 * peak
    falling = sum(rate < peak for rate in rates) / len(rates)
    assert falling == pytest.approx(0.4, abs=0.2)
    assert "heldout_loss" in read_metrics(tmp_path)[-1]
    state = newest_state(tmp_path)
    assert state["plan"]["total_rows"] == state["progress"]["rows_seen"]


def test_a_killed_run_spends_what_is_left(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts what was spent until its last sign of life, and not the time in between."""
    took(clock, monkeypatch, 0.5)
    begun = clock()

    def killed(*args: object) -> None:
        if clock() - begun > 150:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_pretrain.Metrics, "add_update", killed)
        assert train_pretrain.main(tiny_flags(tmp_path, **SETTINGS, max_minutes=5)) == 130
    lost = clock() - begun - read_run_state(tmp_path / "checkpoints")["seconds_spent"]
    assert 0 <= lost <= 4, "a look at the clock is 3 s after the last"
    clock.now += 10_000
    since = clock()
    train_in_process(tmp_path, **SETTINGS, max_minutes=5, from_resume=1)
    spent = 150 + clock() - since
    assert spent == pytest.approx(300, rel=0.02)
    rates = [r["lr"] for r in read_metrics(tmp_path) if "lr" in r]
    assert rates[-1] < 0.02 * max(rates)


# ---------------------------------------------------------------------------- annealing, dry runs


STABLE = {
    "lr_schedule": "wsd",
    "decay_ratio": 0.25,
    "epochs": 4,
    "save_interval": 12,
    "keep_states": 9,
}


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 updates, of which the rate falls in the last twelve."""
    folder = tmp_path_factory.mktemp("stable")
    train_in_process(folder, **STABLE)
    return folder


def annealed(folder: Path, stable: Path, update: int, **changes: object) -> tuple[int, str]:
    """Finish the run of ``stable`` from this update, under another name."""
    (state,) = (stable / "checkpoints").glob(f"*_{update:08d}_*")
    places = {"data_path": stable / "corpus.jsonl", "save_weight": "done", "anneal_from": state}
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = train_pretrain.main(tiny_flags(folder, **STABLE | places | changes))
    return status, out.getvalue()


def test_annealing_from_the_end_of_the_stable_phase_is_the_run_itself(
    stable: Path, tmp_path: Path
) -> None:
    status, log = annealed(tmp_path, stable, 36)
    assert status == 0, log
    whole, found = newest_state(stable), newest_state(tmp_path, "done_32")
    for part in ("model", "optimizer", "progress", "rng"):
        assert_same(found[part], whole[part])


def test_annealing_may_begin_where_the_stable_phase_ends_whatever_its_share_rounds_to(
    tmp_path: Path,
) -> None:
    """305 of 364 rows: what is left, over the ratio, is the next number below one."""
    left = {"decay_ratio": 59 / 364, "save_interval": 10}
    assert (1 - 305 / 364) / left["decay_ratio"] < 1
    train_in_process(tmp_path / "stable", **STABLE | left)
    status, log = annealed(tmp_path / "annealed", tmp_path / "stable", 40, **left)
    assert status == 0, log


def test_annealing_earlier_ends_earlier_with_the_rate_at_its_floor(
    stable: Path, tmp_path: Path
) -> None:
    """A quarter falls, so 24 stable updates are followed by 8; a killed one goes on."""
    status, log = annealed(tmp_path, stable, 24, decay_ratio=0.25)
    assert status == 0, log
    rates = {r["step"]: r["lr"] for r in read_metrics(tmp_path) if "lr" in r}
    assert max(rates) == 32 and rates[24] == 1e-3
    assert [rates[24 + i] for i in range(1, 9)] == pytest.approx(
        [1e-3 * (9 - i) / 8 for i in range(1, 9)], rel=0.1
    )
    status, log = annealed(tmp_path, stable, 24, from_resume=1)
    assert status == 0 and "complete: all" in log


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "its rate is .*expected the peak of a --lr_schedule wsd run, 0.001"),
        ({"lr_schedule": "cosine"}, "lr_schedule +wsd +cosine"),
        ({"anneal_from": "nowhere.safetensors"}, "nowhere.safetensors is not a state. Expected"),
        ({"decay_ratio": 1.0}, "--anneal_from needs a --decay_ratio below 1"),
    ],
)
def test_what_cannot_be_annealed_is_said(
    stable: Path, tmp_path: Path, changes: dict, said: str
) -> None:
    status, log = annealed(tmp_path, stable, 48, **changes)
    assert status in (2, 4) and re.search(said, log), log
    assert not list(tmp_path.rglob("*_resume_*"))


def test_a_dry_run_tells_and_leaves_nothing_but_the_token_cache(tmp_path: Path) -> None:
    words = tiny_flags(tmp_path, dry_run=1, price_per_hour=36, epochs=100)
    before = {path for path in tmp_path.rglob("*") if "cache" not in str(path)}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train_pretrain.main(words) == 0
    assert {path for path in tmp_path.rglob("*") if "cache" not in str(path)} == before
    updates, tokens, minutes, money = re.search(
        r"dry run: ([\d,]+) updates, ([\d,]+) tokens, [\d.]+ per parameter, in ([\d.]+) minutes, "
        r"([\d.]+) at 36 per hour",
        out.getvalue(),
    ).groups()
    assert int(updates.replace(",", "")) == 12 * 100  # 91 rows in updates of 8
    assert int(tokens.replace(",", "")) == 12 * 100 * 8 * 32
    assert float(money) == pytest.approx(float(minutes) / 60 * 36, abs=0.04)
    assert re.search(
        r"s per update \(median of 5\), [\d,]+ tokens/s, peak memory [\d.]+ GiB", out.getvalue()
    )


def test_a_dry_run_beside_a_run_changes_nothing_of_it(stable: Path) -> None:
    before = files_with_times(stable)
    with contextlib.redirect_stdout(io.StringIO()):
        assert train_pretrain.main(tiny_flags(stable, **STABLE, dry_run=1)) == 0
    assert files_with_times(stable) == before


def killed(*args: object) -> None:
    """An end soon after an update."""
    time.sleep(0.3)
    raise KeyboardInterrupt


def note_time_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the thread that notes the time do so every 0.05 s."""
    real = threading.Event.wait
    monkeypatch.setattr(
        threading.Event, "wait", lambda event, seconds=None: real(event, seconds and 0.05)
    )


def test_starts_that_end_before_their_third_update_spend_their_time(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was saved yet, and still 5 x 30 s of the 300 are over; a thread notes the time."""

    note_time_often(monkeypatch)
    begun = clock()
    words = tiny_flags(tmp_path, **SETTINGS, max_minutes=5, from_resume=1)
    for _ in range(5):
        with monkeypatch.context() as patch:
            took(clock, patch, 30)
            patch.setattr(train_pretrain.Metrics, "add_update", killed)
            assert train_pretrain.main(words) == 130
    assert read_run_state(tmp_path / "checkpoints")["seconds_spent"] == pytest.approx(150, abs=1)
    took(clock, monkeypatch, 0.5)
    assert train_pretrain.main(words) == 0
    assert clock() - begun == pytest.approx(300, rel=0.02)
    clock.now += 1000  # a new run, which does not go on with that one
    begun = clock()
    train_in_process(tmp_path, **SETTINGS, max_minutes=5, overwrite=1)
    assert clock() - begun == pytest.approx(300, rel=0.02)


def test_so_do_starts_of_a_decay(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"decay_ratio": 0.25, "save_interval": 60}
    train_in_process(tmp_path, **settings, epochs=2, keep_states=99)
    note_time_often(monkeypatch)
    start = next(
        p for p in list_states(tmp_path / "checkpoints", "pretrain_32") if update_of(p) == 60
    )
    decay = {"anneal_from": start, "save_weight": "annealed", "max_minutes": 5, "from_resume": 1}
    folder = {"checkpoint_dir": tmp_path / "annealed"}
    for _ in range(3):
        with monkeypatch.context() as patch:
            took(clock, patch, 30)
            patch.setattr(train_pretrain.Metrics, "add_update", killed)
            assert train_pretrain.main(tiny_flags(tmp_path, **settings, **decay, **folder)) == 130
    assert read_run_state(tmp_path / "annealed")["seconds_spent"] == pytest.approx(90, abs=1)


def test_a_run_by_time_saved_before_it_had_a_plan_goes_on_by_epochs(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_pretrain.Guard, "stopping", lambda guard: True)
        assert train_pretrain.main(tiny_flags(tmp_path, **SETTINGS, max_minutes=5)) == 75
    assert newest_state(tmp_path)["plan"]["total_rows"] == NOT_KNOWN
    output = train_in_process(tmp_path, **SETTINGS, from_resume=1)
    assert "resuming after update 1" in output
    train_in_process(tmp_path / "whole", **SETTINGS)
    found, whole = newest_state(tmp_path), newest_state(tmp_path / "whole")
    assert found["plan"] == whole["plan"]
    assert found["progress"]["rows_seen"] == whole["progress"]["rows_seen"]


def test_a_decay_by_time_that_had_no_plan_yet_goes_on_by_updates(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as without a time: a third of what came before it, with --decay_ratio 0.25."""
    settings = SETTINGS | {"decay_ratio": 0.25, "save_interval": 20}
    train_in_process(tmp_path, **settings, epochs=2, keep_states=99)
    (start,) = [
        p for p in list_states(tmp_path / "checkpoints", "pretrain_32") if update_of(p) == 60
    ]
    decay = {"anneal_from": start, "save_weight": "annealed"}
    words = tiny_flags(tmp_path, **settings, **decay, max_minutes=5)
    with monkeypatch.context() as patch:
        patch.setattr(train_pretrain.Guard, "stopping", lambda guard: True)
        assert train_pretrain.main(words) == 75
    assert newest_state(tmp_path, "annealed_32")["plan"]["total_rows"] == NOT_KNOWN
    train_in_process(tmp_path, **settings, save_weight="annealed", from_resume=1, epochs=2)
    state = newest_state(tmp_path, "annealed_32")
    assert state["step"] == 80 and state["progress"]["rows_seen"] == 80
