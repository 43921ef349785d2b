"""What the programs that measure have in common.

They run the trainer's own loop and hand it parts of their own, see ``train`` in train_pretrain.py.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

import train_pretrain
from dataset.lm_dataset import PretrainDataset
from model.model_minimind import MiniMindConfig
from trainer.command_line import Parser, parse_flags
from trainer.device import default_device
from trainer.guard.guard import Guard
from trainer.metrics import Metrics
from trainer.program import run_program
from trainer.run import Run

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------ training a variant


class Parts(NamedTuple):
    """What a variant hands to ``train``; by default what the program itself hands in."""

    open_data: Callable[..., PretrainDataset] = train_pretrain.open_data
    build_run: Callable[..., Run] = train_pretrain.build_run
    step: train_pretrain.Step = train_pretrain.train_step


OURS = Parts()


class NoGuard:
    """Takes the place of trainer.guard.Guard: no folder is locked, no signal heard, nothing saved.

    Nor are samples generated: they would take time, and nobody reads them."""

    run: Run  # from ``begin`` on

    def state(self, config: MiniMindConfig) -> None:
        """There is never a state to resume from."""

    def begin(self, run: Run, state: None, num_bad_records: int) -> bool:
        """The run is built; compiling and training come next."""
        self.run = run
        run.can_generate = False
        return True

    @contextlib.contextmanager
    def training(self, run: Run) -> Iterator[None]:
        """All updates happen inside."""
        yield

    def stopping(self) -> bool:
        """No signal ever asks for a stop."""
        return False

    def save(self, run: Run, metrics: Metrics) -> None:
        """Writing states is not what is measured."""


def train(flags: list[str], guard: NoGuard, parts: Parts = OURS) -> None:
    """Train as ``train_pretrain.py`` does with these flags, without its output.

    Raises: SystemExit with its exit status if it fails; the error is on stderr."""

    def program() -> None:
        guards = cast(Guard, guard)  # it has all verbs that are called
        train_pretrain.train(parse_flags(flags), guards, *parts)

    with contextlib.redirect_stdout(io.StringIO()):
        if status := run_program(program):
            raise SystemExit(status)


def build_changed(changes: tuple[Callable[[Run], None], ...], *given: Any) -> Run:
    """See ``built_with``; a function of the module, so that processes can be handed it."""
    run = train_pretrain.build_run(*given)
    for change in changes:
        change(run)
    return run


def built_with(*changes: Callable[[Run], None]) -> Callable[..., Run]:
    """A ``build_run`` that applies ``changes`` to the run that the program builds."""
    return partial(build_changed, changes)


# ------------------------------------------------------------------------------- initial weights


@torch.no_grad()
def redraw(draw: Callable[[str, nn.Parameter, int], None], run: Run) -> None:
    """Call ``draw`` with each parameter's name, the parameter and the number of layers."""
    for name, parameter in run.model.named_parameters():
        draw(name, parameter, run.config.num_hidden_layers)


def is_output(name: str) -> bool:
    """Whether a matrix writes into the residual stream."""
    return "o_proj" in name or "down_proj" in name


def drawn_outputs(name: str, parameter: nn.Parameter, num_layers: int) -> None:
    """Draw outputs as all other matrices, in place of the zeros that they begin with here."""
    if is_output(name):
        nn.init.normal_(parameter, std=0.02)


# ------------------------------------------------------------------- command lines and processes


def parser(description: str | None) -> Parser:
    """A command line with --device, which every program here has."""
    made = Parser(description)
    made.add_argument("--device", default=default_device(), help="cuda, mps or cpu")
    return made


def words(flags: Mapping[str, object]) -> list[str]:
    """The flags as a command line has them; a list's items follow their flag one by one."""
    found = []
    for name, value in flags.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def surroundings(args: argparse.Namespace, module: str) -> str:
    """What a reader needs to measure the same again: command, date, hardware, versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(args.device))
    command = " ".join(["python", "-m", module, *sys.argv[1:]])
    return (
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {name}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, commit `{commit}`"
    )


def reports(name: str, function: Callable[..., None], *arguments: object) -> list[dict]:
    """Call ``function(pipe, *arguments)`` in a new process, which inherits nothing of this one.

    Returns: what it sent through the pipe. Raises: SystemExit naming what failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    found = []
    with contextlib.suppress(EOFError):
        while True:
            found.append(ours.recv())
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: failed, the cause is above")
    return found
