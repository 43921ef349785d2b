"""SIGTERM, SIGINT and SIGHUP end a run in order, whenever they come and whoever gets them."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from dataset.token_cache import damaged_file
from tests import launched
from tests.helpers import ROOT
from tests.running import (
    assert_same,
    descendant_pids,
    metrics_without_times,
    newest_state,
    read_metrics,
    short_documents,
    tiny_flags,
    train_in_process,
    training_command,
    write_corpus,
)
from trainer.guard.run_folder import read_run_state

SETTINGS = {"dropout": 0.1, "save_interval": 1000, "eval_interval": 9, "timeout": 30}
GRACE = 20.0  # seconds in which a run must have stopped


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(record["step"] >= step for record in read_metrics(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that no signal stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train_in_process(folder, **SETTINGS)
    return folder


def assert_stopped(folder: Path, log: Path, name: str, statuses: list[int]) -> int:
    """In order, saved, and said so in one line. Returns the update that was saved."""
    text = log.read_text()
    assert set(statuses) == {75}, text
    told = [line for line in text.splitlines() if line.startswith("stopping:")]
    assert len(told) == 1 and f"{name} received, saved update" in told[0], text
    assert "Traceback" not in text
    state, said = newest_state(folder), read_run_state(folder / "checkpoints")
    assert (said["status"], said["code"], said["step"]) == ("interrupted", 75, state["step"])
    logged = [record["step"] for record in read_metrics(folder) if "loss" in record]
    assert logged[-1] == state["step"], "an update was finished, and not saved"
    return state["step"]


def assert_goes_on(folder: Path, whole: Path, num_ranks: int = 1, **changes: object) -> None:
    """The same command ends as if nothing had happened."""
    words = tiny_flags(folder, **SETTINGS | changes, from_resume=1)
    log = folder / "log2"
    assert set(launched.run_trainers(words, log, num_ranks)) == {0}, log.read_text()
    assert_same(newest_state(folder), newest_state(whole))
    assert metrics_without_times(folder) == metrics_without_times(whole)


def stop(processes: list[BaseProcess], number: int, rank: int = 0) -> list[int]:
    """Signal one rank; all must end in time."""
    os.kill(processes[rank].pid, number)
    return launched.wait_for_all(processes, timeout=GRACE)


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("SIGTERM", 2),
        ("SIGINT", 0),
        ("SIGHUP", 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("SIGTERM", 0), ("SIGINT", 2), ("SIGHUP", 2))
        ),
    ],
)
def test_a_signal_in_training_saves_the_update_and_stops(
    whole: Path, tmp_path: Path, name: str, workers: int
) -> None:
    log = tmp_path / "log"
    words = tiny_flags(tmp_path, **SETTINGS, num_workers=workers)
    processes = launched.start_trainers(words, log, faults=[("slow_updates", {"seconds": 0.1})])
    until(reached(tmp_path, 3))
    statuses = stop(processes, getattr(signal, name))
    assert 3 <= assert_stopped(tmp_path, log, name, statuses) <= 6
    assert_goes_on(tmp_path, whole)


def test_a_run_of_a_billion_epochs_goes_on_after_a_signal(tmp_path: Path) -> None:
    """Its plan is below the most rows that a state may plan."""
    log = tmp_path / "log"
    words = tiny_flags(tmp_path, epochs=10**9, from_resume=1)
    for start in (1, 2):
        processes = launched.start_trainers(words, log)
        until(reached(tmp_path, 5 * start))
        assert stop(processes, signal.SIGTERM) == [75], log.read_text()
    assert "resuming after update" in log.read_text()


def test_a_signal_to_one_rank_stops_all_at_the_same_update(tmp_path: Path) -> None:
    settings = SETTINGS | {"accumulation_steps": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    log = tmp_path / "log"
    assert launched.run_trainers(tiny_flags(whole, **settings), log, 2) == [0, 0]
    log.unlink()
    words = tiny_flags(cut, **settings)
    processes = launched.start_trainers(words, log, 2, [("slow_updates", {"seconds": 0.1})])
    until(reached(cut, 3))
    statuses = stop(processes, signal.SIGTERM, rank=1)
    assert set(statuses) == {75}, log.read_text()
    assert "another rank received a signal, saved update" in log.read_text()
    assert read_run_state(cut / "checkpoints")["status"] == "interrupted"
    assert_goes_on(cut, whole, 2, accumulation_steps=2)


def test_a_signal_in_an_evaluation_puts_it_off_to_the_next_start(
    whole: Path, tmp_path: Path
) -> None:
    log, marker = tmp_path / "log", tmp_path / "evaluating"
    slow = [("slow_evaluation", {"marker": str(marker), "seconds": 3.0})]  # 30 in all
    processes = launched.start_trainers(tiny_flags(tmp_path, **SETTINGS), log, faults=slow)
    until(marker.exists)
    statuses = stop(processes, signal.SIGTERM)
    assert assert_stopped(tmp_path, log, "SIGTERM", statuses) == 9
    assert newest_state(tmp_path)["progress"]["evaluated_step"] == 0
    assert_goes_on(tmp_path, whole)


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_loses_nothing(whole: Path, tmp_path: Path) -> None:
    log, marker = tmp_path / "log", tmp_path / "evaluating"
    slow = [("slow_evaluation", {"marker": str(marker), "seconds": 1.0})]
    settings = SETTINGS | {"eval_interval": 1000}
    train_in_process(tmp_path / "whole", **settings)
    processes = launched.start_trainers(tiny_flags(tmp_path, **settings), log, faults=slow)
    until(marker.exists)
    assert_stopped(tmp_path, log, "SIGTERM", stop(processes, signal.SIGTERM))
    assert_goes_on(tmp_path, tmp_path / "whole", eval_interval=1000)
    done = read_run_state(tmp_path / "checkpoints")
    assert (done["status"], done["code"]) == ("complete", 0)


def test_a_signal_in_a_save_lets_it_finish(whole: Path, tmp_path: Path) -> None:
    log, marker = tmp_path / "log", tmp_path / "saving"
    slow = [("slow_save", {"marker": str(marker), "seconds": 0.2})]
    words = tiny_flags(tmp_path, **SETTINGS | {"save_interval": 5})
    processes = launched.start_trainers(words, log, faults=slow)
    until(marker.exists)
    statuses = stop(processes, signal.SIGTERM)
    assert 5 <= assert_stopped(tmp_path, log, "SIGTERM", statuses) <= 6
    assert not list(tmp_path.rglob("*.part"))
    assert_goes_on(tmp_path, whole)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_during_tokenization_leaves_nothing_half_made(
    tmp_path: Path, num_ranks: int
) -> None:
    log = tmp_path / "log"
    tmp_path.joinpath("corpus.jsonl").touch()
    write_corpus(tmp_path / "corpus.jsonl", short_documents(100_000))
    words = tiny_flags(tmp_path, **SETTINGS)
    processes = launched.start_trainers(words, log, num_ranks)
    until(lambda: list(tmp_path.glob("cache/.building-*/tokens.bin")))
    since = time.monotonic()
    for process in processes[1:]:
        os.kill(process.pid, signal.SIGTERM)
    statuses = stop(processes, signal.SIGTERM)
    assert time.monotonic() - since < GRACE
    assert set(statuses) == {75}, log.read_text()
    assert "stopping: SIGTERM received, there was nothing to save" in log.read_text()
    for left in (tmp_path / "cache").iterdir():  # none, or all of it: the signal came too late
        assert not left.name.startswith(".") and damaged_file(left) is None
    assert read_run_state(tmp_path / "checkpoints")["status"] == "interrupted"


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = tiny_flags(tmp_path, **SETTINGS)
    processes = launched.start_trainers(words, log, faults=[("slow_updates", {"seconds": 30})])
    until(lambda: log.exists() and "run: 2 x" in log.read_text())
    time.sleep(1)
    os.kill(processes[0].pid, signal.SIGINT)
    until(lambda: "Ctrl-C again stops without saving" in log.read_text())
    since = time.monotonic()
    assert stop(processes, signal.SIGINT) == [-signal.SIGINT]
    assert time.monotonic() - since < 2
    assert not list(tmp_path.rglob("*_resume_*"))


def started(tmp_path: Path, words: list[str], **options: object) -> subprocess.Popen:
    """The real command line in a process group of its own; its output in a file."""
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, **options
        )
    launched.STARTED.append(process)
    return process


def long_flags(folder: Path, **changes: object) -> list[str]:
    """A run that lasts until it is stopped."""
    return tiny_flags(folder, **SETTINGS | {"epochs": 2000, "eval_interval": 10**6} | changes)


def test_a_signal_to_the_whole_group_reaches_loader_processes_and_still_saves(
    tmp_path: Path,
) -> None:
    process = started(tmp_path, training_command(long_flags(tmp_path, num_workers=2)))
    until(reached(tmp_path, 3))
    os.killpg(process.pid, signal.SIGTERM)
    assert_stopped(tmp_path, tmp_path / "log", "SIGTERM", [process.wait(timeout=GRACE)])


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_stops_its_ranks_and_the_file_tells_what_torchrun_hides(
    tmp_path: Path, name: str
) -> None:
    words = training_command(long_flags(tmp_path, num_workers=1, accumulation_steps=2), num_ranks=2)
    process = started(tmp_path, words)
    until(reached(tmp_path, 3))
    children = descendant_pids(process.pid)
    process.send_signal(getattr(signal, name))
    status = process.wait(timeout=GRACE)
    assert status != 75, "torchrun tells it by now: the file is no longer needed"
    said = read_run_state(tmp_path / "checkpoints")
    assert (said["status"], said["code"]) == ("interrupted", 75), (tmp_path / "log").read_text()
    assert said["step"] == newest_state(tmp_path)["step"]
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 10)


@pytest.mark.slow
def test_nohup_keeps_a_run_going(tmp_path: Path) -> None:
    process = started(tmp_path, ["nohup", *training_command(long_flags(tmp_path))])
    until(reached(tmp_path, 3))
    process.send_signal(signal.SIGHUP)
    last = read_metrics(tmp_path)[-1]["step"]
    until(reached(tmp_path, last + 20))
    process.send_signal(signal.SIGTERM)
    assert_stopped(tmp_path, tmp_path / "log", "SIGTERM", [process.wait(timeout=GRACE)])


@pytest.mark.slow
def test_a_lost_terminal_saves_although_nothing_can_be_printed(tmp_path: Path) -> None:
    """As when ssh drops: SIGHUP comes, and each write to the terminal fails."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, training_command(long_flags(tmp_path)))
    reading = subprocess.Popen(["cat"], stdin=terminal, stdout=subprocess.DEVNULL)
    until(reached(tmp_path, 3))
    reading.kill()
    reading.wait()
    os.close(terminal)
    deadline = time.monotonic() + GRACE
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 75 and ended[0] == pid
    said = read_run_state(tmp_path / "checkpoints")
    assert said["status"] == "interrupted" and "SIGHUP" in said["reason"]
    assert said["step"] == newest_state(tmp_path)["step"]


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_a_run(tmp_path: Path) -> None:
    """``train_pretrain.py | head``: who watched is gone, training goes on."""
    words = training_command(tiny_flags(tmp_path, **SETTINGS))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 0, error
    assert error == b""
    assert read_run_state(tmp_path / "checkpoints")["status"] == "complete"


def test_the_state_file_says_what_a_run_does_and_how_it_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = launched.start_trainers(
        tiny_flags(tmp_path, **SETTINGS), log, faults=[("slow_updates", {"seconds": 1})]
    )
    until(reached(tmp_path, 1))
    said = read_run_state(tmp_path / "checkpoints")
    assert (said["status"], said["code"], said["pid"]) == ("running", None, processes[0].pid)
    launched.kill_all(processes)
    assert read_run_state(tmp_path / "checkpoints")["status"] == "running"  # nobody could tell
    output = train_in_process(tmp_path, **SETTINGS, from_resume=1)
    assert "the last run here was killed" in output
    content = json.loads((tmp_path / "checkpoints" / "run_state.json").read_text())
    assert (content["status"], content["code"], content["reason"]) == ("complete", 0, "")
    assert train_refused(tmp_path) == 4
    assert read_run_state(tmp_path / "checkpoints") == content, "a refused start overwrote it"


def train_refused(folder: Path) -> int:
    """A new run where a complete one is."""
    return launched.run_trainers(tiny_flags(folder, **SETTINGS), folder / "log")[0]
