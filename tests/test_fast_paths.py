"""Each fast path, broken on purpose: one line tells, and the run trains on by the plain path.

On the CPU, where a stand-in takes the place of the kernel for attention, and the "device" that
makes rows is the CPU itself. The compiler's backend is one that compiles nothing."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import train_pretrain
from dataset.lm_dataset import PretrainDataset
from model import documents
from model.model_minimind import MiniMindForCausalLM
from tests import launched
from tests.running import (
    metrics_without_times,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
    train_in_process,
    training_command,
)
from tests.test_model import attend_in_a_loop
from trainer import distributed, fast_paths
from trainer.fast_paths import (
    ATTENTION,
    COMPILED,
    EXPERTS,
    FUSED_OPTIMIZER,
    MICRO_BATCH,
    ROWS_ON_DEVICE,
)

# Raised and hidden within dynamo.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")
TINY = {"epochs": 1, "hidden_size": 64}
REASONS = {"raises": "RuntimeError: no kernel image is available", "lies": "Differs: "}


def broken(function: Callable[..., Any], how: str) -> Callable[..., Any]:
    """A function that raises, or returns twice the result, or works in place twice."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if how == "raises":
            raise RuntimeError("no kernel image is available\nfor execution on the device")
        result = function(*args, **kwargs)
        return function(*args, **kwargs) if result is None else result * 2

    return function if how == "works" else call


def attention(patch: pytest.MonkeyPatch, how: str) -> None:
    patch.setattr(fast_paths, "has_kernel_within_documents", lambda run: True)
    patch.setattr(documents, "_varlen_attn", broken(attend_in_a_loop, how))


def grouped_products(patch: pytest.MonkeyPatch, how: str) -> None:
    patch.setattr(torch.nn.functional, "grouped_mm", broken(torch.nn.functional.grouped_mm, how))


def compiler(patch: pytest.MonkeyPatch, how: str) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        first = broken(lambda *args: graph(*args)[0], how)
        return lambda *args: [first(*args), *graph(*args)[1:]]

    compile_parts = MiniMindForCausalLM.compile_parts
    patch.setattr(MiniMindForCausalLM, "compile_parts", lambda self: compile_parts(self, backend))


def fused_adamw(patch: pytest.MonkeyPatch, how: str) -> None:
    works = torch._fused_adamw_
    fails = broken(works, how)

    def of_toys_alone(weights: list, *args: Any, **kwargs: Any) -> None:
        """What is tried when it is built has four rows."""
        return (fails if len(weights[0]) > 4 else works)(weights, *args, **kwargs)

    patch.setattr(torch, "_fused_adamw_", of_toys_alone)


def rows_on_device(patch: pytest.MonkeyPatch, how: str) -> None:
    moves = iter([True, False])  # there, and back

    def move(data: PretrainDataset, device: torch.device) -> PretrainDataset:
        data.cache.moved = None
        if next(moves):
            data.cache.moved = broken(lambda: data.cache.tokens, how)(), data.cache.offsets
        return data

    patch.setattr(fast_paths, "fits_on_device", lambda run, data: True)
    patch.setattr(PretrainDataset, "to", move)


def memory(patch: pytest.MonkeyPatch, how: str) -> None:
    patch.setattr(fast_paths, "chooses_by_memory", lambda device: True)
    patch.setattr(fast_paths, "fit_micro_batch", broken(lambda *args: 0, how))


FLAGS = {EXPERTS: {"use_moe": 1}, COMPILED: {"use_compile": 1}}
BREAK = {
    ATTENTION: attention,
    EXPERTS: grouped_products,
    COMPILED: compiler,
    FUSED_OPTIMIZER: fused_adamw,
    ROWS_ON_DEVICE: rows_on_device,
    MICRO_BATCH: memory,
}
FAULTS = [(name, how) for name in BREAK for how in REASONS if (name, how) != (MICRO_BATCH, "lies")]


def losses(folder: Path) -> list[dict]:
    """Everything but the texts: transformers uses some of the kernels, too."""
    found = metrics_without_times(folder)
    texts = ("continuations", "repeated_4grams")
    return [{k: v for k, v in record.items() if k not in texts} for record in found]


def warnings_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if "so the run does without" in line]


@pytest.mark.parametrize(("name", "how"), FAULTS)
def test_a_broken_fast_path_costs_speed_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    attempt, flags = fast_paths.attempt, TINY | FLAGS.get(name, {})

    def without(run: Any, of: str, work: Any, undo: Callable[[], object]) -> None:
        undo() if of == name else attempt(run, of, work, undo)

    with monkeypatch.context() as patch:
        patch.setattr(fast_paths, "attempt", without)
        train_in_process(tmp_path / "plain", **flags)
    with monkeypatch.context() as patch:
        BREAK[name](patch, how)
        output = train_in_process(tmp_path / "broken", **flags)
    (line,) = warnings_in(output)
    start = f"warning: {name} failed, so the run does without, more slowly: {REASONS[how]}"
    assert line.startswith(start) and line.endswith("Please report this line as an issue.")
    assert losses(tmp_path / "broken") == losses(tmp_path / "plain")
    told = json.loads((tmp_path / "broken" / "checkpoints" / "run_state.json").read_text())
    assert told["fast_paths"][name].startswith(REASONS[how])


@pytest.mark.parametrize("name", BREAK)
def test_a_fast_path_that_works_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    BREAK[name](monkeypatch, "works")
    flags = TINY | FLAGS.get(name, {}) | {"strict_fast_path": 1}
    assert not warnings_in(train_in_process(tmp_path, **flags))
    told = json.loads((tmp_path / "checkpoints" / "run_state.json").read_text())
    assert told["fast_paths"][name] == "used"


@pytest.mark.parametrize("flags", [{"use_moe": 1}, {"use_compile": 1}], ids=str)
def test_dropout_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict
) -> None:
    """It draws the same in both passes; what is compiled draws in its own way."""
    compiler(monkeypatch, "works")
    train_in_process(tmp_path, **TINY | flags, dropout=0.5, strict_fast_path=1)


def test_a_resumed_run_does_without_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fused_adamw(patch, "raises")
        train_in_process(tmp_path, **TINY | {"save_interval": 3, "keep_states": 99})
    words = {"from_resume": 1, "resume_step": 3}
    output = train_in_process(tmp_path, **TINY, **words)
    assert not warnings_in(output)
    assert f"note: {FUSED_OPTIMIZER} failed at an earlier start of this run" in output
    assert newest_state(tmp_path, "pretrain_64")["rounding"]["without"] == FUSED_OPTIMIZER


def test_strict_makes_it_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fused_adamw(monkeypatch, "raises")
    assert train_pretrain.main(tiny_flags(tmp_path, **TINY, strict_fast_path=1)) == 2
    assert capsys.readouterr().err == (
        f"error: --strict_fast_path 1: {FUSED_OPTIMIZER} failed: "
        f"RuntimeError: no kernel image is available\n"
    )
    assert not read_metrics(tmp_path)


def test_the_trials_change_nothing(tmp_path: Path) -> None:
    """The same losses with and without, dropout's draws included."""
    flags = TINY | {"use_moe": 1, "dropout": 0.1}
    train_in_process(tmp_path / "tried", **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pretrain, "make_fast", lambda run, data, one_pass: None)
        train_in_process(tmp_path / "not_tried", **flags)
    found, expected = (metrics_without_times(tmp_path / name) for name in ("tried", "not_tried"))
    assert found == expected


def train_with_a_broken_rank(argv: list[str]) -> int:
    """The trainer, on whose last rank the fused optimizer fails."""
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 1:
            fused_adamw(patch, "raises")
        return train_pretrain.main(argv)


def test_what_fails_on_one_rank_is_used_on_none(tmp_path: Path) -> None:
    words, log = tiny_flags(tmp_path, **TINY), tmp_path / "log"
    start = partial(launched.run_trainers, words, log, 2)
    assert start(program=train_with_a_broken_rank) == [0, 0], log.read_text()
    (line,) = warnings_in(log.read_text())
    assert "RuntimeError: on another rank: RuntimeError: no kernel image is available" in line


BREAKS_THE_DEVICE = """
import os, sys
import pytest, torch
import train_pretrain
from tests import test_fast_paths
from trainer import fast_paths

if fast_paths.WITHOUT not in os.environ:  # at the first start
    test_fast_paths.fused_adamw(pytest.MonkeyPatch(), "raises")
    fast_paths.is_lost = lambda device: True
sys.exit(train_pretrain.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_path_that_breaks_the_device_costs_a_second_start(tmp_path: Path, num_ranks: int) -> None:
    words = tiny_flags(tmp_path, **TINY)
    if num_ranks == 1:
        command = [sys.executable, "-c", BREAKS_THE_DEVICE, *words]
    else:
        program = tmp_path / "program.py"
        program.write_text(f"import sys\nsys.path.insert(0, '.')\n{BREAKS_THE_DEVICE}")
        command = training_command(words, num_ranks)
        command[command.index("train_pretrain.py")] = str(program)
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    (line,) = warnings_in(done.stdout)
    assert line.startswith(f"warning: {FUSED_OPTIMIZER} failed")
    assert f"note: {FUSED_OPTIMIZER} failed, and the device with it" in done.stdout
    assert newest_state(tmp_path, "pretrain_64")["rounding"]["without"] == FUSED_OPTIMIZER
