"""A run that outlives its machine: its states are elsewhere, too, and an empty disk can go on."""

import shutil
import time
from pathlib import Path

import pytest

from tests import launched
from tests.running import (
    assert_same,
    metrics_without_times,
    newest_state,
    tiny_flags,
    train_in_process,
)
from tests.test_signals import until
from trainer.checkpoint import list_states, update_of

SETTINGS = {"dropout": 0.1, "save_interval": 3}


def vanish(folder: Path) -> None:
    """The disk is gone; the corpus is downloaded again."""
    for part in ("out", "checkpoints", "cache"):
        shutil.rmtree(folder / part, ignore_errors=True)


def trained(folder: Path, *, faults: list[tuple] = (), **changes: object) -> tuple[int, str]:
    log = folder / "log"
    words = tiny_flags(folder, **SETTINGS | changes)
    log.unlink(missing_ok=True)
    status = launched.run_trainers(words, log, faults=list(faults))[0]
    return status, log.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_in_process(folder, **SETTINGS)
    return folder


def test_an_empty_machine_goes_on_from_the_mirror_to_the_last_bit(
    whole: Path, tmp_path: Path
) -> None:
    mirror = tmp_path / "mirror"
    words = tiny_flags(tmp_path, **SETTINGS, checkpoint_mirror=mirror)
    processes = launched.start_trainers(
        words, tmp_path / "log", faults=[("slow_updates", {"seconds": 0.1})]
    )
    until(lambda: len(list_states(mirror, "pretrain_32")) == 2)
    launched.kill_all(processes)
    newest = update_of(list_states(mirror, "pretrain_32")[0])
    vanish(tmp_path)
    status, log = trained(tmp_path, checkpoint_mirror=mirror, from_resume=1)
    assert status == 0, log
    assert f"resuming after update {newest}" in log and "from the mirror" in log
    assert_same(newest_state(tmp_path), newest_state(whole))
    assert metrics_without_times(tmp_path) == metrics_without_times(whole)
    weights = "out/pretrain_32.pth"
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()
    there = [path.name for path in list_states(mirror, "pretrain_32")]
    assert there == [p.name for p in list_states(tmp_path / "checkpoints", "pretrain_32")]

    vanish(tmp_path)  # of a run that is complete, the rest is made again
    status, log = trained(tmp_path, checkpoint_mirror=mirror, from_resume=1)
    assert status == 0 and "nothing to do" in log
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics_without_times(tmp_path) == metrics_without_times(whole)


def test_the_newer_of_disk_and_mirror_counts(whole: Path, tmp_path: Path) -> None:
    """A machine that had the run once, and another that took it further."""
    mirror = tmp_path / "mirror"
    death = [("die_in_update", {"step": 8, "how": "SIGKILL"})]
    assert trained(tmp_path, faults=death)[0] == -9
    shutil.copytree(whole / "checkpoints", mirror)
    there = update_of(list_states(mirror, "pretrain_32")[0])
    status, log = trained(tmp_path, checkpoint_mirror=mirror, from_resume=1)
    assert status == 0 and f"resuming after update {there}" in log, log
    assert_same(newest_state(tmp_path), newest_state(whole))


def test_a_damaged_local_state_is_replaced_by_its_copy(whole: Path, tmp_path: Path) -> None:
    for part in ("out", "checkpoints"):
        shutil.copytree(whole / part, tmp_path / part)
    shutil.copytree(whole / "checkpoints", tmp_path / "mirror")
    newest = list_states(tmp_path / "checkpoints", "pretrain_32")[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    status, log = trained(tmp_path, checkpoint_mirror=tmp_path / "mirror", from_resume=1)
    assert status == 0 and "nothing to do" in log, log
    assert newest.read_bytes() == (whole / "checkpoints" / newest.name).read_bytes()


def test_a_mirror_that_is_gone_neither_stops_nor_slows_training(
    whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    words = tiny_flags(tmp_path, **SETTINGS, checkpoint_mirror=tmp_path / "file" / "mirror")
    processes = launched.start_trainers(words, tmp_path / "log", faults=[("impatient_mirror", {})])
    assert launched.wait_for_all(processes) == [0]
    log = (tmp_path / "log").read_text()
    assert log.count("was not copied to") == 1 and "it is only at" in log
    assert_same(newest_state(tmp_path), newest_state(whole))
    assert "Traceback" not in log


def test_nothing_here_and_a_mirror_that_cannot_be_read_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mirror = tmp_path / "file" / "mirror"
    since = time.monotonic()
    faults = [("impatient_mirror", {})]
    status, log = trained(tmp_path, faults=faults, checkpoint_mirror=mirror, from_resume=1)
    assert status == 6 and f"--checkpoint_mirror {mirror} cannot be read" in log, log
    assert time.monotonic() - since < 30
    assert not list_states(tmp_path / "checkpoints", "pretrain_32")


def test_a_new_run_does_not_take_another_runs_mirror(whole: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    shutil.copytree(whole / "checkpoints", mirror)
    status, log = trained(tmp_path, checkpoint_mirror=mirror)
    assert status == 4 and f"{mirror}/pretrain_32_resume_" in log and "an earlier run" in log
    status, log = trained(tmp_path, checkpoint_mirror=mirror, overwrite=1, seed=7, epochs=1)
    assert status == 0, log
    assert {p.name for p in list_states(mirror, "pretrain_32")} == {
        p.name for p in list_states(tmp_path / "checkpoints", "pretrain_32")
    }


def test_the_mirror_s_flag_is_checked(tmp_path: Path) -> None:
    for url, expected in (
        ("sftp://me:secret@host/x", "holds a password"),
        (tmp_path / "checkpoints", "--checkpoint_mirror is --checkpoint_dir"),
        ("gopher://x/y", "no address that can be used"),
    ):
        status, log = trained(tmp_path, checkpoint_mirror=url)
        assert status == 2 and expected in log and "secret" not in log, log
