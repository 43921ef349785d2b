"""SIGKILL at any moment, then the same command: the run that was never killed, to the last bit."""

import itertools
import random
import re
import shutil
import socket
import time
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
    train_in_process,
)
from trainer import checkpoint, host
from trainer.checkpoint import list_states, update_of
from trainer.trainer_utils import SkipBatchSampler

SETTINGS = {"dropout": 0.1, "save_interval": 3, "eval_interval": 8, "batch_size": 1}
ROWS = 12  # of an update, on any number of ranks


def settings(num_ranks: int, **changes: object) -> dict:
    return SETTINGS | {"accumulation_steps": ROWS // num_ranks, "from_resume": 1} | changes


def finish(folder: Path, num_ranks: int, **changes: object) -> str:
    """Run the command to its end, which must be a good one. Returns what it printed."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    words = tiny_flags(folder, **settings(num_ranks, **changes))
    statuses = launched.run_trainers(words, log, num_ranks)
    assert statuses == [0] * num_ranks, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, float]]:
    """Uninterrupted runs by number of ranks, and their seconds."""
    found = {}
    warm_up = tmp_path_factory.mktemp("warm_up")  # the first start takes seconds more
    finish(warm_up, 1, epochs=1)
    for num_ranks in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"whole{num_ranks}")
        tiny_flags(folder)  # writes the corpus
        since = time.monotonic()
        finish(folder, num_ranks)
        found[num_ranks] = folder, time.monotonic() - since
    return found


def assert_equal_runs(cut: Path, whole: Path, at_least: int = 2) -> None:
    """State, weights and metrics; and nothing half-written is left."""
    assert_same(newest_state(cut), newest_state(whole))
    assert metrics_without_times(cut) == metrics_without_times(whole)
    steps = [record["step"] for record in read_metrics(cut) if "loss" in record]
    assert steps == list(range(1, steps[-1] + 1))
    name = "out/pretrain_32.pth"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert not list(cut.rglob("*.part"))
    assert at_least <= len(list_states(cut / "checkpoints", "pretrain_32")) <= 2


def kill_often(whole: tuple[Path, float], folder: Path, num_ranks: int, kills: int) -> None:
    """So many kills at random moments, one life after another, then a last life to its end."""
    reference, seconds = whole
    dice = random.Random(f"{num_ranks} {kills}")
    done, life = 0, 0
    while done < kills:
        cut = folder / str(life)
        for _ in range(min(dice.randint(1, 4), kills - done)):
            cut.mkdir(exist_ok=True)
            words = tiny_flags(cut, **settings(num_ranks))
            processes = launched.start_trainers(words, cut / "log", num_ranks)
            time.sleep(dice.uniform(0, seconds))
            alive = all(process.is_alive() for process in processes)
            launched.kill_all(processes)
            done += alive
            if not alive:
                break  # it was complete already
        finish(cut, num_ranks)
        assert_equal_runs(cut, reference)
        life += 1


@pytest.mark.parametrize(("num_ranks", "kills"), [(1, 3), (2, 3), (4, 2)])
def test_kills_at_random_moments_change_no_bit(
    whole: dict, tmp_path: Path, num_ranks: int, kills: int
) -> None:
    kill_often(whole[num_ranks], tmp_path, num_ranks, kills)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "kills"), [(1, 40), (2, 30), (4, 30)])
def test_a_hundred_kills_change_no_bit(
    whole: dict, tmp_path: Path, num_ranks: int, kills: int
) -> None:
    kill_often(whole[num_ranks], tmp_path, num_ranks, kills)


def crash_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The operations on files of a short run, by number; of each file's writes, one after another
    into a file that nobody reads yet, the first, one in the middle and the last."""
    seen: list[str] = []
    operations = launched.Operations(lambda name, *_: seen.append(name))
    for module in (checkpoint, host):
        monkeypatch.setattr(module, "os", operations)
    train_in_process(folder, **settings(1, epochs=1, save_interval=4))
    monkeypatch.undo()
    points: list[int] = []
    for name, group in itertools.groupby(range(len(seen)), key=seen.__getitem__):
        numbers = list(group)
        some = {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
        points += sorted(some) if name == "write" else numbers
    return points


def crash_at(points: list[int], folder: Path, reference: Path) -> None:
    for point in points:
        cut = folder / f"at{point}"
        words = tiny_flags(cut, **settings(1, epochs=1, save_interval=4))
        kill = [("kill_at_operation", {"number": point})]
        assert launched.run_trainers(words, cut / "log", faults=kill) == [-9]
        finish(cut, 1, epochs=1, save_interval=4)
        assert_equal_runs(cut, reference)
        shutil.rmtree(cut)


def test_a_crash_within_a_save_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    points = crash_points(whole, monkeypatch)
    assert len(points) > 100
    crash_at(sorted(random.Random(5).sample(points, 3)), tmp_path, whole)


@pytest.mark.slow
def test_a_crash_at_every_point_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    crash_at(crash_points(whole, monkeypatch), tmp_path, whole)


def test_a_complete_run_whose_weights_were_lost_writes_them_again(
    whole: dict, tmp_path: Path
) -> None:
    """A kill may come between the last state and the weights; a new disk has neither."""
    reference, _ = whole[1]
    shutil.copytree(reference, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "out")
    assert "nothing to do" in finish(tmp_path / "cut", 1)
    assert_equal_runs(tmp_path / "cut", reference)
    before = files_with_times(tmp_path / "cut")
    finish(tmp_path / "cut", 1)
    after = files_with_times(tmp_path / "cut")
    assert {k: v for k, v in after.items() if not k.endswith("log")} == {
        k: v for k, v in before.items() if not k.endswith("log")
    }


def global_batches(folder: Path, num_ranks: int) -> dict[int, list[int]]:
    """By update, its rows in their global order, put together from what each rank trained on."""
    parts: dict[int, dict[int, list[int]]] = {}
    for rank in range(num_ranks):
        for line in Path(f"{folder / 'rows'}.{rank}").read_text().splitlines():
            step, *rows = map(int, line.split())
            parts.setdefault(step, {})[rank] = rows  # an update repeated after a kill counts once
    batches = {}
    for step, by_rank in parts.items():  # batches of one row, dealt to ranks in turn
        turns = range(max(map(len, by_rank.values())))
        batches[step] = [rows[i] for i in turns for rows in by_rank.values() if i < len(rows)]
    return batches


def test_from_one_rank_to_two_four_three_and_one_the_updates_stay_the_same(
    whole: dict, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    faults = [("log_rows", {"path": str(alone / "rows")})]
    words = tiny_flags(alone, **settings(1))
    assert launched.run_trainers(words, alone / "log", faults=faults) == [0]
    expected = global_batches(alone, 1)

    folder, seen = tmp_path / "elastic", {}
    kills = {1: 4, 2: 7, 4: 10, 3: 13}
    for num_ranks in (1, 2, 4, 3, 1):
        for old in folder.glob("rows.*"):
            old.unlink()
        words = tiny_flags(folder, **settings(1))  # always the same command
        faults = [("log_rows", {"path": str(folder / "rows")})]
        if num_ranks in kills and not (num_ranks == 1 and seen):
            death = {"step": kills[num_ranks], "how": "SIGKILL", "rank": num_ranks - 1}
            faults.append(("die_in_update", death))
        processes = launched.start_trainers(words, folder / "log", num_ranks, faults)
        statuses = launched.wait_for_all(processes)
        assert all(statuses) or not any(statuses), (folder / "log").read_text()
        for step, rows in global_batches(folder, num_ranks).items():
            if len(rows) == len(expected[step]):  # a killed rank leaves its last update incomplete
                assert rows == expected[step], (num_ranks, step)
                seen.setdefault(step, set()).add(num_ranks)
    assert seen.keys() == expected.keys()
    assert set.union(*seen.values()) == {1, 2, 3, 4}
    log = (folder / "log").read_text()
    for dead in (1, 3, 2):  # and not a living one that waits for its dead neighbour
        assert f"error: rank {dead} on {socket.gethostname()} is dead or stuck" in log
    assert not re.search("saved with.* accumulation_steps", log)
    assert "the same run except for rounding" in log
    losses = [r["loss"] for r in read_metrics(folder) if "loss" in r]
    for found, reference in zip(
        losses, (r["loss"] for r in read_metrics(alone) if "loss" in r), strict=True
    ):
        assert found == pytest.approx(reference, rel=0.05)  # other dropout on other ranks


def test_a_number_of_ranks_that_does_not_divide_the_update_names_those_that_do(
    whole: dict, tmp_path: Path
) -> None:
    shutil.copytree(whole[1][0], tmp_path / "cut")
    words = tiny_flags(tmp_path / "cut", **settings(1, batch_size=3, accumulation_steps=12))
    log = tmp_path / "log"
    assert set(launched.run_trainers(words, log, num_ranks=3)) == {2}
    assert "update of 12 rows does not divide into batches of 3 on 3 ranks; use 1, 2, 4" in (
        log.read_text()
    )


def test_any_chain_of_ranks_and_kills_deals_each_row_once_and_in_order() -> None:
    """A thousand random chains of lives, each with its own ranks and its own batch size."""
    dice = random.Random(11)
    for _ in range(1000):
        num_rows, rows_per_update = dice.randint(1, 400), dice.choice([4, 12, 24, 48])
        trained: list[int] = []
        while len(trained) < num_rows:
            world_size = dice.choice([n for n in (1, 2, 3, 4, 6) if rows_per_update % n == 0])
            fitting = [b for b in range(1, 13) if rows_per_update % (world_size * b) == 0]
            batch = dice.choice(fitting)
            updates = dice.randint(1, 9)  # before the next kill
            padded = -(-num_rows // batch) * batch
            ranks = [
                iter(
                    SkipBatchSampler(
                        range(padded),
                        batch,
                        len(trained) // batch,
                        rank=rank,
                        world_size=world_size,
                    )
                )
                for rank in range(world_size)
            ]
            for _ in range(updates * rows_per_update // (world_size * batch)):
                for rank in ranks:
                    trained += [row for row in next(rank, []) if row < num_rows]
        assert trained == list(range(num_rows))


def test_going_back_past_a_spike_skips_the_named_updates_and_goes_on(
    whole: dict, tmp_path: Path
) -> None:
    reference, _ = whole[1]
    expected_log = tmp_path / "all"
    faults = [("log_rows", {"path": str(expected_log / "rows")})]
    words = tiny_flags(expected_log, **settings(1))
    assert launched.run_trainers(words, expected_log / "log", faults=faults) == [0]
    every = global_batches(expected_log, 1)

    cut = tmp_path / "cut"
    words = tiny_flags(cut, **settings(1))
    death = [("die_in_update", {"step": 11, "how": "SIGKILL"})]
    assert launched.run_trainers(words, cut / "log", faults=death) == [-9]
    kept = [update_of(path) for path in list_states(cut / "checkpoints", "pretrain_32")]
    assert kept == [9, 6]
    back = {"resume_step": 6, "skip_steps": "8:10"}
    words = tiny_flags(cut, **settings(1, **back))
    faults = [("log_rows", {"path": str(cut / "rows")})]
    death = [("die_in_update", {"step": 14, "how": "SIGKILL"})]
    assert launched.run_trainers(words, cut / "log", faults=faults + death) == [-9]
    again = launched.start_trainers(
        words, cut / "log", faults=faults
    )  # the same command goes on, not back
    assert launched.wait_for_all(again) == [0]
    found = global_batches(cut, 1)
    assert sorted(found) == [step for step in every if step == 7 or step > 9]
    assert all(found[step] == every[step] for step in found)
    assert newest_state(cut)["rollbacks"] == [[6, "8:10"]]
    assert (
        newest_state(cut)["progress"]["rows_seen"]
        == newest_state(reference)["progress"]["rows_seen"]
    )
    assert len(list((cut / "checkpoints").glob("*_resume_*"))) == 2


def test_a_state_that_is_not_kept_cannot_be_gone_back_to(whole: dict, tmp_path: Path) -> None:
    shutil.copytree(whole[1][0], tmp_path / "cut")
    before = list_states(tmp_path / "cut" / "checkpoints", "pretrain_32")
    words = tiny_flags(tmp_path / "cut", **settings(1, resume_step=5))
    log = tmp_path / "log"
    assert launched.run_trainers(words, log) == [4]
    kept = ", ".join(str(update_of(path)) for path in before)
    assert "--resume_step 5: no good state of that update in" in log.read_text()
    assert f"there are: {kept}" in log.read_text()
    assert list_states(tmp_path / "cut" / "checkpoints", "pretrain_32") == before


def test_a_refused_way_back_sets_no_state_aside(whole: dict, tmp_path: Path) -> None:
    shutil.copytree(whole[1][0], tmp_path / "cut")
    before = list_states(tmp_path / "cut" / "checkpoints", "pretrain_32")
    words = tiny_flags(
        tmp_path / "cut", **settings(1, resume_step=update_of(before[-1]), learning_rate=9e-4)
    )
    assert launched.run_trainers(words, tmp_path / "log") == [2]
    assert "these settings differ from the saved run's" in (tmp_path / "log").read_text()
    assert list_states(tmp_path / "cut" / "checkpoints", "pretrain_32") == before
