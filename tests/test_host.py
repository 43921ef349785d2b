"""Consoles, disks and systems of other kinds, and what happens before and around a run."""

import ast
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.running import (
    descendant_pids,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
    train_in_process,
    training_command,
)
from tests.test_signals import GRACE, long_flags, reached, started, until
from trainer import host
from trainer.guard.run_folder import read_run_state

SAID = "stopping: {} received, there was nothing to save"


def environment(**changes: str) -> dict[str, str]:
    return os.environ | changes


# ---------------------------------------------------------------------------- time and signals


def test_a_run_s_time_begins_with_its_program_or_with_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(host.time, "monotonic", lambda: now)
    monkeypatch.setattr(host.signal, "signal", lambda *args: None)
    host.begin_program()
    now = 105.0  # what importing took
    host.begin_run()
    now = 110.0
    assert host.run_time() == 10
    now = 3700.0  # an hour later, in the same process, as in a notebook
    host.begin_run()
    now = 3701.0
    assert host.run_time() == 1


def test_an_old_process_gives_a_run_all_its_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_run_began", time.monotonic() - 3600)
    output = train_in_process(tmp_path, max_minutes=0.05)
    assert "minutes" in output and newest_state(tmp_path)["seconds_spent"] < 60


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("program", ["train_pretrain.py", "train_full_sft.py", "train_dpo.py"])
def test_a_signal_while_importing_ends_the_program_in_order(
    tmp_path: Path, name: str, program: str
) -> None:
    process = started(tmp_path, training_command(tiny_flags(tmp_path), program=program))
    mask = 1 << (getattr(signal, name) - 1)
    status = Path(f"/proc/{process.pid}/status")
    until(lambda: any(int(line.split()[1], 16) & mask for line in caught(status)), 20)
    time.sleep(0.3)  # torch is being imported
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=GRACE) == 75
    assert (tmp_path / "log").read_text().strip() == SAID.format(name)


def caught(status: Path) -> list[str]:
    """The line that tells for which signals a process has handlers."""
    return [line for line in status.read_text().splitlines() if line.startswith("SigCgt")]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_second_signal_after_the_save_changes_nothing(tmp_path: Path, name: str) -> None:
    process = started(tmp_path, training_command(long_flags(tmp_path)))
    until(reached(tmp_path, 3))
    process.send_signal(signal.SIGTERM)
    log = tmp_path / "log"
    until(lambda: "stopping: SIGTERM received, saved" in log.read_text(), GRACE)
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=GRACE) == 75
    assert "Traceback" not in log.read_text()


def test_ranks_whose_torchrun_is_killed_save_and_end(tmp_path: Path) -> None:
    words = long_flags(tmp_path, accumulation_steps=2)
    process = started(tmp_path, training_command(words, num_ranks=2))
    until(reached(tmp_path, 3))
    ranks = descendant_pids(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(is_running(pid) for pid in ranks), GRACE)
    state, log = newest_state(tmp_path), (tmp_path / "log").read_text()
    logged = [record["step"] for record in read_metrics(tmp_path) if "loss" in record]
    assert state["step"] == logged[-1] >= 3, log
    said = read_run_state(tmp_path / "checkpoints")
    assert (said["status"], said["code"]) == ("interrupted", 75), log
    process = started(tmp_path, training_command([*words, "--from_resume", "1"], num_ranks=2))
    until(reached(tmp_path, state["step"] + 3))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=GRACE)


def is_running(pid: int) -> bool:
    """Whether a process is there and not only its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --------------------------------------------------------------------------- consoles and disks


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk", "utf-8"])
def test_a_console_that_lacks_characters_ends_no_run(tmp_path: Path, encoding: str) -> None:
    """The samples hold Chinese, and the sign for a line break is in few encodings."""
    words = training_command(tiny_flags(tmp_path, epochs=1))
    done = subprocess.run(
        words, cwd=ROOT, env=environment(PYTHONIOENCODING=encoding), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"The capital of France is" in done.stdout


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_folder_sync_is_used_and_named_once(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    output = train_in_process(tmp_path, epochs=1)
    note = f"note: {tmp_path / 'checkpoints'} cannot be told to keep the names of its files"
    assert output.count(note) == 1
    assert newest_state(tmp_path)["step"] > 0


def test_a_disk_that_fails_at_folder_sync_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "it fails")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="it fails"):
        host.sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_used_and_named_once(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    output = train_in_process(tmp_path, epochs=1)
    assert output.count(f"note: {tmp_path / 'checkpoints'} has no locks") == 1
    assert newest_state(tmp_path)["step"] > 0


def test_a_lock_that_another_process_holds_is_no_lack_of_locks(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); "
    held += "print('held',flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with path.open("r+") as file, pytest.raises(BlockingIOError):
            host.lock(file.fileno())
        other.kill()
    with path.open("r+") as file:
        assert host.lock(file.fileno())


# -------------------------------------------------------------------------------- other systems

WITHOUT = """
import signal, sys
import torch, torch.distributed, torch.utils.data
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGCHLD"):
    delattr(signal, name)
import train_pretrain, eval_llm
from scripts import export
words = sys.argv[1:]
folder = words[words.index("--save_dir") + 1]
statuses = [
    train_pretrain.main([*words, "--epochs", "1"]),
    train_pretrain.main([*words, "--epochs", "1", "--from_resume", "1"]),
    eval_llm.main(["--save_dir", folder, "--device", "cpu", "--prompt", "Word"]),
    export.main(["--save_dir", folder, "--to", "hf", "--output", folder + "/hf"]),
]
print("statuses", statuses)
"""


def test_the_programs_run_where_windows_modules_and_signals_are_all_there_is(
    tmp_path: Path,
) -> None:
    """An imitation: torch and transformers, imported before, know that this is Linux."""
    done = run_command([sys.executable, "-c", WITHOUT, *tiny_flags(tmp_path)])
    assert "statuses [0, 0, 0, 0]" in done.stdout, done.stdout + done.stderr
    assert "has no locks" in done.stdout


ONLY_IN_HOST = {"fcntl", "resource", "msvcrt"}


def test_one_file_speaks_to_the_system() -> None:
    """What another system lacks is imported in trainer/host.py alone, inside functions."""
    for path in ROOT.glob("*/**/*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("tests/", "bench/")) or "cache" in name:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        everywhere = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        nodes = top if name in ("trainer/host.py", "dataset/token_cache.py") else everywhere
        imported = {alias.name for node in nodes for alias in node.names}
        assert not imported & ONLY_IN_HOST, name
