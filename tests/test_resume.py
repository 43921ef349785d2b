"""A run that was killed and resumed is the run that was never killed, to the last bit."""

from pathlib import Path

import pytest

from tests import launched
from tests.running import (
    assert_same,
    files_with_times,
    metrics_without_times,
    newest_state,
    read_metrics,
    tiny_flags,
    train_and_kill,
    train_in_process,
    train_on_ranks,
)
from trainer import metrics
from trainer import run as run_module
from trainer.checkpoint import list_states, update_of
from trainer.run import Run


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, num_ranks: int
) -> None:
    settings = {"dropout": 0.1, "accumulation_steps": 4 // num_ranks}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output = train_on_ranks(whole, num_ranks, **settings)
    assert output.count("parameters, vocabulary") == 1, "not only the first rank prints"
    assert output.count("held out: loss") == 1

    last = train_and_kill(cut, 7, num_ranks, **settings)
    assert last < newest_state(whole)["step"], "killed too late to prove anything"
    output = train_on_ranks(cut, num_ranks, **settings, from_resume=1)
    assert "resuming after update" in output
    assert_same(newest_state(cut), newest_state(whole))
    assert metrics_without_times(cut) == metrics_without_times(whole)


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    train_in_process(tmp_path, epochs=1)
    before = files_with_times(tmp_path)
    assert "nothing to do" in train_in_process(tmp_path, epochs=1, from_resume=1)
    assert files_with_times(tmp_path) == before


def test_resuming_without_a_state_is_a_new_run(tmp_path: Path) -> None:
    assert "a new run" in train_in_process(tmp_path, epochs=1, from_resume=1)
    assert newest_state(tmp_path)["progress"]["rows_seen"] > 0


def test_ranks_see_the_same_data_and_lose_the_same(tmp_path: Path) -> None:
    losses = {}
    for num_ranks in (1, 2, 4):
        folder = tmp_path / str(num_ranks)
        settings = {"batch_size": 1, "accumulation_steps": 8 // num_ranks, "eval_interval": 9}
        words = tiny_flags(folder, epochs=1, **settings)
        statuses = launched.run_trainers(words, folder / "log", num_ranks)
        assert statuses == [0] * num_ranks
        losses[num_ranks] = [
            (r["step"], r.get("loss", r.get("heldout_loss"))) for r in read_metrics(folder)
        ]
    for num_ranks in (2, 4):
        for (step, alone), (same_step, shared) in zip(losses[1], losses[num_ranks], strict=True):
            assert step == same_step
            assert shared == pytest.approx(alone, abs=2e-5), (num_ranks, step)


def test_workers_and_intervals_do_not_change_the_result(tmp_path: Path) -> None:
    train_in_process(tmp_path / "a", epochs=1, dropout=0.1)
    train_in_process(
        tmp_path / "b", epochs=1, dropout=0.1, num_workers=2, save_interval=3, eval_interval=4
    )
    a, b = newest_state(tmp_path / "a"), newest_state(tmp_path / "b")
    assert_same(a["model"], b["model"])
    assert_same(a["rng"], b["rng"])


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    """Otherwise equality would prove nothing."""
    for seed in (1, 2):
        train_in_process(tmp_path / str(seed), epochs=1, seed=seed)
    assert metrics_without_times(tmp_path / "1") != metrics_without_times(tmp_path / "2")


@pytest.mark.slow
def test_compiled_code_loses_the_same_over_fifty_updates_and_resumes_exactly(
    tmp_path: Path,
) -> None:
    """It is kept for the next run: one of a minute cannot pay for a minute of compiling."""
    settings = {"num_hidden_layers": 1, "epochs": 5, "cache_dir": tmp_path / "cache"}
    kept = []
    for name, use_compile in (("compiled", 1), ("eager", 0)):
        words = tiny_flags(tmp_path / name, use_compile=use_compile, **settings)
        assert launched.wait_for_all(
            launched.start_trainers(words, tmp_path / "log"), timeout=300
        ) == [0]
        kept.append(set((tmp_path / "cache" / "compiled" / "fxgraph").rglob("*")))
    compiled, eager = (
        [r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r]
        for name in ("compiled", "eager")
    )
    assert len(compiled) >= 50 and compiled == pytest.approx(eager, abs=1e-3)

    words = tiny_flags(tmp_path / "cut", use_compile=1, from_resume=1, **settings)
    death = ("die_in_update", {"step": 33, "how": "SIGKILL"})
    for faults, status in (([death], -9), ([], 0)):
        processes = launched.start_trainers(words, tmp_path / "log", faults=faults)
        assert launched.wait_for_all(processes, timeout=300) == [status]
    assert_same(newest_state(tmp_path / "cut"), newest_state(tmp_path / "compiled"))
    kept.append(set((tmp_path / "cache" / "compiled" / "fxgraph").rglob("*")))
    assert kept[0] and kept[2] == kept[0], "a later run compiled anew"


def test_a_kill_while_the_last_save_removed_older_states_leaves_none_for_good(
    tmp_path: Path,
) -> None:
    """A complete run saves no more, so the next start removes them; here, more were kept before."""
    train_in_process(tmp_path, keep_states=4)
    states = list_states(tmp_path / "checkpoints", "pretrain_32")
    assert len(states) == 4
    said = train_in_process(tmp_path, keep_states=2, from_resume=1)
    assert "nothing to do" in said
    assert list_states(tmp_path / "checkpoints", "pretrain_32") == states[:2]


def test_a_state_saved_before_any_update_was_made_is_resumed(tmp_path: Path) -> None:
    """The optimizer has no moments yet."""
    settings = {"skip_steps": "1:8", "save_interval": 5}
    train_in_process(tmp_path / "whole", **settings)
    train_in_process(tmp_path / "cut", **settings, keep_states=99)
    folder = tmp_path / "cut" / "checkpoints"
    for path in list_states(folder, "pretrain_32"):
        if update_of(path) > 5:
            path.unlink()
    output = train_in_process(tmp_path / "cut", **settings, from_resume=1)
    assert "resuming after update 5" in output
    assert_same(newest_state(tmp_path / "cut"), newest_state(tmp_path / "whole"))


def test_a_long_log_is_thinned_and_a_killed_run_s_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": 4, "eval_interval": 7}
    train_in_process(tmp_path / "full", **settings)
    monkeypatch.setattr(metrics, "MAX_RECORDS", 20)
    train_in_process(tmp_path / "whole", **settings, keep_states=99)
    full, whole = (
        [{k: v for k, v in record.items() if not k.startswith("forecast")} for record in found]
        for found in (metrics_without_times(tmp_path / name) for name in ("full", "whole"))
    )  # forecasts follow from the records
    assert len(full) > 45 and len(whole) <= 24 and all(record in full for record in whole)
    held_out = [record for record in full if "heldout_loss" in record]
    assert len(held_out) > 5 and all(record in whole for record in held_out)
    assert whole[-9:] == full[-9:] and whole[0] == full[0]
    written = metrics_without_times(tmp_path / "whole")
    assert newest_state(tmp_path / "whole")["records"] == written
    for path in list_states(tmp_path / "whole" / "checkpoints", "pretrain_32"):
        if update_of(path) > 25:
            path.unlink()
    train_in_process(tmp_path / "whole", **settings, keep_states=99, from_resume=1)
    assert metrics_without_times(tmp_path / "whole") == written


def test_outcomes_that_no_line_shows_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold memory; and the log tells the same."""
    rare = {"log_interval": 10**6, "save_interval": 10**6, "eval_interval": 10**6}
    held = []
    advance = Run.advance

    def counted(run: Run, *args: object) -> None:
        advance(run, *args)
        held.append(len(run.pending))

    monkeypatch.setattr(run_module, "MAX_PENDING", 4)
    monkeypatch.setattr(Run, "advance", counted)
    train_in_process(tmp_path / "rare", **rare)
    assert max(held) == 4 and len(held) > 12
    monkeypatch.setattr(run_module, "MAX_PENDING", 100)
    train_in_process(tmp_path / "plain", **rare)
    assert metrics_without_times(tmp_path / "rare") == metrics_without_times(tmp_path / "plain")
