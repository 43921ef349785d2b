"""Trainer processes with injected faults: how they are started, waited for and killed.

They are forked from a server process that has imported everything (see conftest.py), so a start
takes 0.1 s rather than 5 s. The faults are real: a signal, an errno, a value in a tensor. A test
names them in ``faults``, as pairs of a function below (see FAULTS) and its arguments.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import transformers

import train_pretrain
from tests.strict import make_strict
from trainer import checkpoint, distributed, evaluation, host
from trainer.guard import mirror

make_strict()
hasattr(transformers, "Qwen3ForCausalLM")  # imported here once, not by each run at its first text

STARTED: list = []  # processes that a failed test may leave behind; conftest.py kills them
OPERATIONS = ("open", "write", "fsync", "close", "replace", "unlink")  # in trainer/checkpoint.py


class Operations:
    """Replaces ``os`` in trainer/checkpoint.py; calls ``before`` and ``after`` each operation."""

    def __init__(self, before: Callable, after: Callable = lambda *args: None) -> None:
        for name in OPERATIONS:
            setattr(self, name, self._watched(name, getattr(os, name), before, after))

    @staticmethod
    def _watched(name: str, real: Callable, before: Callable, after: Callable) -> Callable:
        def call(*args: object, **options: object) -> object:
            before(name, *args)
            result = real(*args, **options)
            after(name, result, *args)
            return result

        return call

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def at_operation(number: int, strike: Callable[[str], None]) -> None:
    """Call ``strike`` before the file operation with this number, from 0."""
    count = iter(range(10**9))

    def before(name: str, *args: object) -> None:
        if next(count) == number:
            strike(name)

    checkpoint.os = host.os = Operations(before)


def kill_at_operation(number: int) -> None:
    """SIGKILL before the file operation with this number, from 0."""
    at_operation(number, lambda name: os.kill(os.getpid(), signal.SIGKILL))


def fail_at_operation(number: int, code: str) -> None:
    """Let the file operation with this number fail with errno ``code``, for instance ENOSPC."""

    def strike(name: str) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    at_operation(number, strike)


def in_update(step: int, strike: Callable[[object], None], rank: int = 0) -> None:
    """Call ``strike(run)`` at the beginning of update ``step`` on one rank."""
    train_step = train_pretrain.train_step

    def struck(run: object, window: list, num_labels: int) -> torch.Tensor:
        if run.step + 1 == step and distributed.rank() == rank:
            strike(run)
        return train_step(run, window, num_labels)

    train_pretrain.train_step = struck


def die_in_update(step: int, how: str, rank: int = 0) -> None:
    """Let a rank die, hang or fail at the beginning of update ``step``."""

    def strike(run: object) -> None:
        if how in ("SIGKILL", "SIGSTOP", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, how))
        elif how == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        elif how == "exit":
            os._exit(3)
        elif how == "sleep":
            time.sleep(3600)
        else:
            raise RuntimeError("a mistake in the program")

    in_update(step, strike, rank)


def die_in_save(how: str, rank: int = 1) -> None:
    """Send a rank the signal ``how`` while the first rank saves."""
    save = train_pretrain.Run.save

    def struck(run: object, tracker: object) -> object:
        if distributed.rank() == rank:
            os.kill(os.getpid(), getattr(signal, how))
        return save(run, tracker)

    train_pretrain.Run.save = struck


def poison(steps: list[int], value: str, where: str, rank: int = 0) -> None:
    """Multiply the loss by ``value``, or set an element of a gradient to it.

    This happens in the last batch of each update in ``steps``."""
    bad = float(value)
    train_step = train_pretrain.train_step

    def poisoned(run: object, window: list, num_labels: int) -> torch.Tensor:
        if run.step + 1 not in steps or distributed.rank() != rank or not window:
            return train_step(run, window, num_labels)
        forward, left = run.model.forward, [len(window)]

        def bad_forward(*args: object, **options: object) -> object:
            out = forward(*args, **options)
            left[0] -= 1
            if left[0] == 0 and where == "loss":
                out.loss = out.loss * bad
            elif left[0] == 0:
                weight = run.model.model.norm.weight
                at = torch.tensor([3], device=weight.device)
                removed.append(weight.register_hook(lambda grad: grad.index_fill(0, at, bad)))
            return out

        removed: list = []
        run.model.forward = bad_forward
        try:
            return train_step(run, window, num_labels)
        finally:
            del run.model.forward
            for hook in removed:
                hook.remove()

    train_pretrain.train_step = poisoned


def log_rows(path: str) -> None:
    """Append a line per update to ``<path>.<rank>``: its number and a hash of each row."""
    train_step = train_pretrain.train_step

    def logged(run: object, window: list, num_labels: int) -> torch.Tensor:
        with open(f"{path}.{distributed.rank()}", "a", encoding="utf-8") as file:
            rows = [hash(tuple(row.tolist())) for batch in window for row in batch.input_ids]
            print(run.step + 1, *rows, file=file)
        return train_step(run, window, num_labels)

    train_pretrain.train_step = logged


def slow_updates(seconds: float) -> None:
    """Make each update take longer by ``seconds``."""
    train_step = train_pretrain.train_step

    def slowed(*args: object) -> torch.Tensor:
        time.sleep(seconds)
        return train_step(*args)

    train_pretrain.train_step = slowed


def hold_update(step: int, marker: str) -> None:
    """Let update ``step`` wait until the file ``marker`` exists."""

    def wait_for_it(run: object) -> None:
        while not Path(marker).exists():
            time.sleep(0.02)

    in_update(step, wait_for_it)


def start_late(rank: int, seconds: float) -> None:
    """Let one rank start ``seconds`` after the others."""
    if distributed.rank() == rank:
        time.sleep(seconds)


def slow_evaluation(marker: str, seconds: float) -> None:
    """Make each held-out batch take longer; the first one creates the file ``marker``."""
    unless = evaluation.unless

    def slowed(stopping: Callable, items: Iterable) -> Iterator:
        for item in unless(stopping, items):
            Path(marker).touch()
            time.sleep(seconds)
            yield item

    evaluation.unless = slowed


def slow_save(marker: str, seconds: float) -> None:
    """Make each fsync of a save take longer; the first one creates the file ``marker``."""
    save = train_pretrain.Run.save

    def before(name: str, *args: object) -> None:
        if name == "fsync":
            Path(marker).touch()
            time.sleep(seconds)

    def slowed(*args: object) -> object:
        checkpoint.os = host.os = Operations(before)
        return save(*args)

    train_pretrain.Run.save = slowed


def stuck_loader(row: int) -> None:
    """Let a loader process hang when it is asked for ``row``."""
    getitems = train_pretrain.PretrainDataset.__getitems__

    def stuck(data: object, rows: list[int]) -> object:
        if row in rows:
            time.sleep(3600)
        return getitems(data, rows)

    train_pretrain.PretrainDataset.__getitems__ = stuck


def impatient_mirror() -> None:
    """Retry and give up a failing mirror within about a second."""
    mirror.FAILING_SECONDS, mirror.PAUSES = 1, (0.1, 0.1)


FAULTS = {
    fault.__name__: fault
    for fault in (
        kill_at_operation,
        fail_at_operation,
        die_in_update,
        die_in_save,
        poison,
        log_rows,
        slow_updates,
        hold_update,
        start_late,
        slow_evaluation,
        slow_save,
        stuck_loader,
        impatient_mirror,
    )
}


Program = Callable[[list[str]], int]  # given the command line's words; returns the exit status


def trainer_main(
    program: Program, argv: list[str], environment: dict[str, str], log: str, faults: list[tuple]
) -> None:
    """The main function of a started process: install the faults, and run the program."""
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # for loader processes: Linux's default
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(handled, signal.SIG_DFL)  # as if started by a shell, not by pytest
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, options in faults:
        FAULTS[name](**options)
    sys.exit(program(argv))


def free_port() -> int:
    """A TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_trainers(
    argv: list[str],
    log: Path,
    num_ranks: int = 1,
    faults: list[tuple] = (),
    environment: dict[str, str] | None = None,
    program: Program = train_pretrain.main,
) -> list[BaseProcess]:
    """Start a process per rank, with the environment of torchrun; ``log`` gets their output."""
    context = multiprocessing.get_context("forkserver")
    shared = {"PYTHONHASHSEED": "0"}
    if num_ranks > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        shared |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    shared |= environment or {}
    processes = []
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
        args = program, argv, shared | own, str(log), list(faults)
        processes.append(context.Process(target=trainer_main, args=args))
        processes[-1].start()
    STARTED.extend(processes)
    return processes


def wait_for_all(processes: list[BaseProcess], timeout: float = 120) -> list[int]:
    """Wait until all have ended. Returns: exit statuses, -N for a process ended by signal N."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    kill_all(late)
    assert not late, f"{len(late)} processes did not end within {timeout} s"
    return [process.exitcode for process in processes]


def run_trainers(
    argv: list[str],
    log: Path,
    num_ranks: int = 1,
    faults: list[tuple] = (),
    environment: dict[str, str] | None = None,
    program: Program = train_pretrain.main,
) -> list[int]:
    """Start trainers and wait for all of them. Returns: exit statuses, see ``wait_for_all``."""
    return wait_for_all(start_trainers(argv, log, num_ranks, faults, environment, program))


def kill_all(processes: list[BaseProcess]) -> None:
    """SIGKILL those that are still alive."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.join()


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL a command that leads a process group, with the whole group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_leftovers() -> None:
    """Kill what the last test started and did not end."""
    kill_all(
        [process for process in STARTED if isinstance(process, BaseProcess) and process.is_alive()]
    )
    for process in STARTED:
        if isinstance(process, subprocess.Popen):
            kill_group(process)
    STARTED.clear()


if __name__ == "__main__":  # under torchrun; no faults after its first restart
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        for fault, options in json.loads(os.environ["FAULTS"]):
            FAULTS[fault](**options)
    sys.exit(train_pretrain.main(sys.argv[1:]))
