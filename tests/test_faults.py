"""Disks, clocks and memory that fail: how each ends; and a state of an earlier release opens."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import launched
from tests.helpers import ROOT
from tests.running import (
    assert_same,
    metrics_without_times,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
    train_in_process,
)
from trainer.checkpoint import list_states
from trainer.guard.run_folder import read_run_state

GOLDEN = ROOT / "tests" / "golden"
# What made the golden state; --data_path and --tokenizer_path are in its folder.
GOLDEN_FLAGS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_seq_len": 32,
    "epochs": 1,
    "dropout": 0.1,
    "save_interval": 4,
    "tokenizer_path": GOLDEN / "tokenizer",
    "data_path": GOLDEN / "corpus.jsonl",
}


def test_a_state_of_an_earlier_release_can_be_resumed(tmp_path: Path) -> None:
    """Against a run from the beginning: other processors round otherwise, so not to the bit."""
    train_in_process(tmp_path / "whole", **GOLDEN_FLAGS)
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    for state in GOLDEN.glob("*.safetensors"):
        shutil.copy(state, cut / "checkpoints")
    output = train_in_process(cut, **GOLDEN_FLAGS, from_resume=1)
    assert "resuming after update 4" in output
    found, whole = newest_state(cut, "pretrain_16"), newest_state(tmp_path / "whole", "pretrain_16")
    for name, weight in whole["model"].items():
        torch.testing.assert_close(found["model"][name], weight, rtol=1e-4, atol=1e-5)
    losses = [
        [r["loss"] for r in read_metrics(f) if "loss" in r] for f in (cut, tmp_path / "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    mounted = run_command(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip(f"cannot mount a disk here: {mounted.stderr}")
    try:
        yield disk
    finally:
        run_command(["umount", str(disk)])


@pytest.mark.parametrize("flag", ["checkpoint_dir", "save_dir"])
def test_a_folder_that_cannot_be_written_is_found_before_the_data_is_read(
    tmp_path: Path, small_disk: Path, flag: str
) -> None:
    assert run_command(["mount", "-o", "remount,ro", str(small_disk)]).returncode == 0
    log = tmp_path / "log"
    assert launched.run_trainers(tiny_flags(tmp_path, **{flag: small_disk / "x"}), log) == [6]
    assert f"error: cannot write to --{flag} {small_disk / 'x'}: Read-only file system" in (
        log.read_text()
    )
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_becomes_full_ends_the_run_and_more_room_lets_it_go_on_exactly(
    tmp_path: Path, small_disk: Path
) -> None:
    settings = {"dropout": 0.1, "save_interval": 3}
    train_in_process(tmp_path / "whole", **settings)
    places = {"checkpoint_dir": small_disk / "c", "save_dir": small_disk / "out"}
    words, log = tiny_flags(tmp_path, **settings, **places), tmp_path / "log"
    (small_disk / "filler").write_bytes(b"x" * 4_300_000)
    assert launched.run_trainers(words, log) == [6]
    error = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "No space left on device" in error[0]
    assert not list(small_disk.rglob("*.part"))
    (small_disk / "filler").unlink()
    statuses = launched.run_trainers([*words, "--from_resume", "1"], log)
    assert statuses == [0], log.read_text()
    shutil.move(small_disk / "c", tmp_path / "checkpoints")
    shutil.move(small_disk / "out", tmp_path / "out")
    assert_same(newest_state(tmp_path), newest_state(tmp_path / "whole"))
    assert metrics_without_times(tmp_path) == metrics_without_times(tmp_path / "whole")


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
def test_a_disk_error_in_a_save_is_told_and_costs_nothing_before(tmp_path: Path, code: str) -> None:
    """One that passes is survived by the second attempt."""
    whole, log = tmp_path / "whole", tmp_path / "log"
    train_in_process(whole, epochs=1)
    fault = [("fail_at_operation", {"number": 48, "code": code})]
    assert launched.run_trainers(tiny_flags(tmp_path, epochs=1), log, faults=fault) == [0]
    assert_same(newest_state(tmp_path), newest_state(whole))
    assert not list(tmp_path.rglob("*.part"))


def test_out_of_memory_says_how_the_same_updates_fit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fault = [("die_in_update", {"step": 2, "how": "out of memory"})]
    assert launched.run_trainers(tiny_flags(tmp_path), log, faults=fault) == [7]
    error = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert re.search(
        "out of memory: .* The same updates need less with --micro_batch_size "
        r"\d+ \(now \d+\); --from_resume 1 resumes from the last save\.",
        error[0],
    )
    assert read_run_state(tmp_path / "checkpoints")["code"] == 7


def test_disk_use_is_bounded_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Never more than the states kept and one in the making, and what a kill left is removed."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    strangers = [
        folder / name
        for name in (
            "notes.tmp",
            ".other_32_resume_00000001_.1-00000000.part",
            "other_32.pth",
            f"pretrain_320_resume_00000001_{'0' * 32}.safetensors",
            ".pretrain_32_resume_1.part.keep",
        )
    ]
    for stranger in strangers:
        stranger.write_text("not ours")
    own = folder / ".pretrain_32_resume_00000007_.4711-0123abcd.part"
    own.write_bytes(b"half a state")
    output = train_in_process(tmp_path, epochs=1, save_interval=1)
    assert f"note: removed {own.name}" in output and not own.exists()
    assert all(stranger.read_text() == "not ours" for stranger in strangers)
    assert len(list(folder.glob("pretrain_32_resume_*"))) == 2
    assert {p.name for p in folder.iterdir()} - {s.name for s in strangers} == {
        ".lock",
        "run_state.json",
        *(p.name for p in list_states(folder, "pretrain_32")),
    }


def test_skipped_records_are_told_and_counted_in_the_state_file(tmp_path: Path) -> None:
    words = tiny_flags(tmp_path)
    with (tmp_path / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"text": null}\n{"txet": "x"}\n')
    assert launched.run_trainers(words, tmp_path / "log") == [3]
    assert "corpus.jsonl line 81 (byte " in (tmp_path / "log").read_text()
    output = train_in_process(tmp_path, epochs=1, bad_records="skip")
    assert "warning: skipped 2 bad records; the first: " in output
    assert read_run_state(tmp_path / "checkpoints")["bad_records"] == 2


def test_more_states_are_kept_when_asked(tmp_path: Path) -> None:
    train_in_process(tmp_path, epochs=1, save_interval=2, keep_states=4)
    assert len(list_states(tmp_path / "checkpoints", "pretrain_32")) == 4


def test_a_clock_that_goes_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_process(tmp_path / "whole", epochs=1)
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: next(now))
    train_in_process(tmp_path / "cut", epochs=1)
    monkeypatch.undo()
    for number, state in enumerate(list_states(tmp_path / "cut" / "checkpoints", "pretrain_32")):
        os.utime(state, (number, number))  # the newest is the oldest by date
    assert_same(newest_state(tmp_path / "cut"), newest_state(tmp_path / "whole"))
    assert "nothing to do" in train_in_process(tmp_path / "cut", epochs=1, from_resume=1)


def make_golden() -> None:
    """Make the state in tests/golden: by hand, after a release that raises the format."""
    words = tiny_flags(GOLDEN / "run", **GOLDEN_FLAGS | {"save_interval": 4})
    death = [("die_in_update", {"step": 6, "how": "SIGKILL"})]
    assert launched.run_trainers(words, GOLDEN / "log", faults=death) == [-9]
    (state,) = list_states(GOLDEN / "run" / "checkpoints", "pretrain_16")
    shutil.copy(state, GOLDEN)
    shutil.rmtree(GOLDEN / "run")
    (GOLDEN / "log").unlink()


if __name__ == "__main__":
    make_golden()
