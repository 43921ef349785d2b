"""States and weights on disk: whole or absent, verified, bounded in number, free of code."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.model_minimind import MiniMindConfig
from tests.running import ROOT, run_command, tiny_flags, train_in_process
from trainer import checkpoint
from trainer.checkpoint import CheckpointError, list_states, newest_state, read_state, save_state
from trainer.trainer_utils import lm_checkpoint

SAVER = """
import sys, torch
from trainer.checkpoint import save_state
for update in range(1, 1000):
    save_state(sys.argv[1], "run_8", update, {"values": torch.full((1_000_000,), float(update))})
    print(update, flush=True)
"""


def state(update: int) -> dict:
    return {"values": torch.arange(1000) * update}


def test_the_newest_two_states_are_kept(tmp_path: Path) -> None:
    (tmp_path / "run_8_resume_notes.safetensors").write_text("not ours")
    for update in (1, 2, 10):
        save_state(tmp_path, "run_8", update, state(update))
    assert [int(p.stem.split("_")[3]) for p in list_states(tmp_path, "run_8")] == [10, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_states_of_other_names_are_never_touched(tmp_path: Path) -> None:
    for name in ("run_8", "run_80", "run_8_moe", "my_run_8"):
        for update in (1, 2, 3):
            save_state(tmp_path, name, update, state(update))
    assert len(list(tmp_path.iterdir())) == 8
    assert len(list_states(tmp_path, "run_8")) == 2


def test_newest_means_most_updates_whatever_the_clock_says(tmp_path: Path) -> None:
    older, newer = (save_state(tmp_path, "run_8", update, state(update)) for update in (100, 200))
    os.utime(newer, (1, 1))
    found, complaints = newest_state(tmp_path, "run_8")
    assert torch.equal(found["values"], state(200)["values"]) and not complaints
    assert older.exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "swap"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path: Path, damage: str) -> None:
    older, newer = (save_state(tmp_path, "run_8", update, state(update)) for update in (1, 2))
    data = bytearray(newer.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    newer.write_bytes({"truncate": data[:-1], "empty": b""}.get(damage, data))
    if damage == "swap":
        newer.write_bytes(older.read_bytes())
    found, complaints = newest_state(tmp_path, "run_8")
    assert torch.equal(found["values"], state(1)["values"])
    assert len(complaints) == 1 and newer.name in complaints[0]


def test_no_good_state_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    save_state(tmp_path, "run_8", 1, state(1)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"run_8_resume_00000001.*--overwrite 1"):
        newest_state(tmp_path, "run_8")


def test_a_format_of_the_future_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = save_state(tmp_path, "run_8", 1, state(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 99.*reads format 3"):
        read_state(path)


def test_a_kill_during_saves_leaves_a_good_state(tmp_path: Path) -> None:
    """Real kills at three moments of a process that does nothing but save."""
    for delay in (0.0, 0.004, 0.01):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            saved = [int(process.stdout.readline()) for _ in range(3)][-1]
            signal.sigtimedwait([], delay)
            process.send_signal(signal.SIGKILL)
            saved = max([saved, *map(int, process.stdout.read().split())])
        found, complaints = newest_state(tmp_path, "run_8")
        assert not complaints
        assert found["values"][0] >= saved and bool((found["values"] == found["values"][0]).all())
        for path in list_states(tmp_path, "run_8"):
            path.unlink()
    save_state(tmp_path, "run_8", 1, state(1))
    checkpoint.remove_partial_files(tmp_path, "run_8")
    assert len(list(tmp_path.iterdir())) == 1, "what a kill left half-written was not removed"


def test_a_full_disk_leaves_the_state_before_it_and_nothing_else(tmp_path: Path) -> None:
    """A limit on file size fails a write halfway, as a full disk does."""
    save_state(tmp_path, "run_8", 1, state(1))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state(tmp_path, "run_8", 2, {"values": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(newest_state(tmp_path, "run_8")[0]["values"], state(1)["values"])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_training_in_one_line_with_the_last_state_readable(tmp_path: Path) -> None:
    """A real disk of 3 MB: one state of this model fits, the second does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = run_command(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr}")
    try:
        words = [sys.executable, "train_pretrain.py", *tiny_flags(tmp_path, checkpoint_dir=disk)]
        done = run_command(words)
        assert done.returncode == 6
        assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1
        found, complaints = newest_state(disk, "pretrain_32")
        assert found["step"] == 5 and not complaints
        assert len(list(disk.glob("*.safetensors"))) == 1 and not list(disk.glob(".*.part"))
    finally:
        run_command(["umount", str(disk)])


@pytest.mark.parametrize(
    "content",
    [
        {"a/b": torch.ones(1), "a": {"b": torch.ones(2)}},
        {1: 0, "1": 1},
        {"$tensor": "x"},
        {"a\nb": 1},
        {"a": "\ud800"},
        {"a": 2**64},
        {"a": torch.ones(1) * 1j},
        {"a": {1, 2}},
    ],
)
def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, content: dict) -> None:
    before = save_state(tmp_path, "run_8", 1, state(1))
    with pytest.raises((TypeError, ValueError, OverflowError)):
        save_state(tmp_path, "run_8", 2, content)
    assert list(tmp_path.iterdir()) == [before]


def test_lm_checkpoint_is_minimind_s_door(tmp_path: Path) -> None:
    config = MiniMindConfig(8, 1, num_attention_heads=2, num_key_value_heads=1, vocab_size=16)
    model, optimizer = torch.nn.Linear(2, 2), None
    assert lm_checkpoint(config, weight="w", save_dir=tmp_path) is None
    optimizer = torch.optim.AdamW(model.parameters())
    places = {"weight": "w", "save_dir": tmp_path}
    lm_checkpoint(config, model=model, optimizer=optimizer, epoch=1, step=7, extra=[1, 2], **places)
    found = lm_checkpoint(config, **places)
    assert (found["epoch"], found["step"], found["extra"]) == (1, 7, [1, 2])
    assert found["model"]["weight"].dtype == torch.float32
    assert torch.equal(found["model"]["weight"], model.weight)
    assert [p.name.startswith("w_8_resume") for p in tmp_path.iterdir()] == [True]


def test_a_resumed_run_passes_over_a_damaged_state(tmp_path: Path) -> None:
    train_in_process(tmp_path, epochs=1)
    states = list_states(tmp_path / "checkpoints", "pretrain_32")
    whole = read_state(states[0])["model"]
    states[0].write_bytes(states[0].read_bytes()[:-10])
    output = train_in_process(tmp_path, epochs=1, from_resume=1)
    assert f"warning: {states[0]}" in output and "resuming after update" in output
    again = read_state(list_states(tmp_path / "checkpoints", "pretrain_32")[0])["model"]
    assert all(torch.equal(whole[key], again[key]) for key in whole)
