"""A loss or gradient that is not finite never reaches weights or a state, on any rank."""

import itertools
import math
from pathlib import Path

import pytest
import torch

import train_pretrain
from dataset.token_cache import unsigned
from tests import launched
from tests.gradients import step, toy_data, toy_model, toy_run
from tests.running import assert_same, newest_state, read_metrics, tiny_flags
from trainer.bad_updates import rows_of
from trainer.checkpoint import list_states, read_state
from trainer.guard.run_folder import read_run_state
from trainer.optimizer import build_optimizer
from trainer.trainer_utils import SkipBatchSampler

SETTINGS = {"save_interval": 4, "epochs": 1}


def trained(folder: Path, *, ranks: int = 1, faults: list[tuple] = (), **changes: object) -> tuple:
    """Exit statuses and what was printed."""
    log = folder / "log"
    words = tiny_flags(folder, **SETTINGS | changes, accumulation_steps=4 // ranks)
    return launched.run_trainers(words, log, ranks, list(faults)), log.read_text()


CASES = list(
    itertools.product(
        ["nan", "inf"],
        ["loss", "gradient"],
        [("float32", 1, 0), ("float16", 1, 0), ("float32", 2, 1), ("float16", 2, 1)],
    )
)
QUICK = {0, 5, 10, 12, 15}  # each value, place, type and number of ranks once at least


@pytest.mark.parametrize(
    ("value", "where", "setting"),
    [
        pytest.param(*case, marks=[] if number in QUICK else pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
)
def test_a_bad_update_is_left_out_counted_and_told(
    tmp_path: Path, value: str, where: str, setting: tuple[str, int, int]
) -> None:
    """As if --skip_steps had left it out: the same weights, moments and step counts."""
    dtype, ranks, rank = setting
    bad = ("poison", {"steps": [3], "value": value, "where": where, "rank": rank})
    found, without = tmp_path / "found", tmp_path / "without"
    statuses, log = trained(found, ranks=ranks, faults=[bad], dtype=dtype)
    assert set(statuses) == {0}, log
    assert f"update 3: loss or gradient is not finite (rank {rank}, documents " in log
    assert log.count("not applied") == 1
    state = newest_state(found)
    assert state["progress"]["bad_updates"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert {r["bad_updates"] for r in read_metrics(found) if "bad_updates" in r} == {1}
    assert all(math.isfinite(r["loss"]) for r in read_metrics(found) if "loss" in r)
    if dtype == "float32":  # a scaler halves its factor, which rounds otherwise
        statuses, log = trained(without, ranks=ranks, skip_steps="3:4")
        reference = newest_state(without)
        for part in ("model", "optimizer"):
            assert_same(state[part], reference[part], part)
    else:
        assert state["scaler"]["scale"] < 65536


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_in_a_row_end_the_run_with_step_rank_and_documents(
    tmp_path: Path, ranks: int
) -> None:
    bad = ("poison", {"steps": [6, 7, 8, 9], "value": "nan", "where": "loss", "rank": ranks - 1})
    statuses, log = trained(tmp_path, ranks=ranks, faults=[bad], max_bad_updates=2)
    assert set(statuses) == {5}
    error = next(line for line in log.splitlines() if line.startswith("error:"))
    assert "update 8: loss or gradient is not finite" in error
    assert f"(rank {ranks - 1}, documents " in error
    assert "the weights are those of update 5" in error
    assert "--skip_steps 6:9" in error
    state = read_state(list_states(tmp_path / "checkpoints", "pretrain_32")[0])
    assert state["step"] <= 8
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    said = read_run_state(tmp_path / "checkpoints")
    assert (said["status"], said["code"]) == ("failed", 5)
    # The way out that the message names.
    changes = {"from_resume": 1, "skip_steps": "6:9", "max_bad_updates": 2}
    statuses, log = trained(tmp_path, ranks=ranks, faults=[bad], **changes)
    assert set(statuses) == {0}, log


def test_none_is_allowed_with_zero(tmp_path: Path) -> None:
    bad = ("poison", {"steps": [3], "value": "inf", "where": "gradient"})
    statuses, log = trained(tmp_path, faults=[bad], max_bad_updates=0)
    assert statuses == [5] and "the weights are those of update 2" in log
    assert list_states(tmp_path / "checkpoints", "pretrain_32") == []


def test_counting_in_a_row_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Two bad ones before the kill and two after make four."""
    steps = [3, 4, 5, 6]
    bad = ("poison", {"steps": steps, "value": "nan", "where": "loss"})
    death = ("die_in_update", {"step": 6, "how": "SIGKILL"})
    statuses, _ = trained(tmp_path, faults=[bad, death], max_bad_updates=3)
    assert statuses == [-9]
    statuses, log = trained(tmp_path, faults=[bad], max_bad_updates=3, from_resume=1)
    assert statuses == [5] and "the weights are those of update 2" in log


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 2), (3, 2), (1, 4)])
def test_the_rows_of_a_rank_are_those_that_its_loader_gave(
    batch_size: int, world_size: int
) -> None:
    """The last window is short, and a batch of it has rows past the end."""
    rows_per_update, num_rows = 12, 31
    padded = -(-num_rows // batch_size) * batch_size
    for rank in range(world_size):
        dealt = [
            row
            for batch in SkipBatchSampler(
                range(padded), batch_size, rank=rank, world_size=world_size
            )
            for row in batch
            if row < num_rows
        ]
        found = [
            row
            for first in range(0, num_rows, rows_per_update)
            for row in rows_of(
                rank, range(first, min(first + rows_per_update, num_rows)), batch_size, world_size
            )
        ]
        assert found == dealt


def test_documents_that_are_named_are_those_of_the_rank_s_rows(tmp_path: Path) -> None:
    """Read back from the rows themselves: what they hold is found in the named documents."""
    data = toy_data(tmp_path)
    for rows in ([0], [3, 4], list(range(len(data)))):
        named = data.documents_of(rows)
        bounds = [data.cache.offsets[d : d + 2].tolist() for d in named]
        ids = {i for begin, end in bounds for i in unsigned(data.cache.tokens[begin:end]).tolist()}
        batch = data.__getitems__(rows)
        text = batch.input_ids[batch.labels != -100].tolist()
        assert set(text) - {data.eos} <= ids
        assert len(named) >= int((batch.input_ids == data.bos).sum())
    assert data.documents_of(range(len(data))) == list(range(len(data.order)))


def test_the_optimizer_changes_nothing_at_all_in_a_bad_update(tmp_path: Path) -> None:
    data, model = toy_data(tmp_path), toy_model().float()
    run = toy_run(data, model, batch_size=4, accumulation_steps=3)
    run.optimizer = build_optimizer(model, 1e-3)
    ((window, _),) = train_pretrain.windows(run, data)
    step(run, window)
    before = [{k: v.clone() for k, v in run.optimizer.state[p].items()} for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    hook = model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    outcome, _ = step(run, window)
    hook.remove()
    assert not torch.isfinite(outcome.grad_norm)
    for parameter, weight, state in zip(model.parameters(), weights, before, strict=True):
        assert torch.equal(parameter, weight)
        assert_same(run.optimizer.state[parameter], state)
    step(run, window)
    assert not torch.equal(model.model.norm.weight, weights[-1])
