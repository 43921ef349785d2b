"""Tries whatever makes a run fast before it trains, and does without what does not work.

Kernels, compilers and drivers differ between machines and releases, and whoever pays by the hour
should get a slower run rather than a traceback. So each fast path is tried on the run's own rows,
weights and sizes, and its results are compared with those of the plain path that it replaces. One
that raises an error, or gives other results, is reported in one line and stays off, also after a
resume; with --strict_fast_path 1 it is an error. All ranks try the same, and decide alike.
"""

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.model_minimind import Experts, ResidualLinear, has_grouped_kernel
from trainer import distributed
from trainer.console import log
from trainer.device import keep_compiled_code, silence_compiler
from trainer.errors import SettingsError, is_out_of_memory, reason_of
from trainer.micro_batch import fit_micro_batch, free_bytes
from trainer.optimizer import OPTIMIZERS, step_if_finite, tensors_of, use_plain_steps
from trainer.run import Run, largest_divisor

Pass = Callable[[Any, float], Tensor]  # forward_backward in train_pretrain.py, of a run

ROWS_ON_DEVICE = "rows made on the device"
FUSED_OPTIMIZER = "fused optimizer"
ATTENTION = "attention within documents"
EXPERTS = "grouped products of experts"
MICRO_BATCH = "micro-batch chosen by memory"
COMPILED = "compiled layers"

WITHOUT = "MINIMIND_WITHOUT"  # environment variable from one start to the next
DATA_SHARE = 1 / 4  # of a device's free memory, at most, for the corpus
PROBE_ROWS = 2  # of the passes that compare kernels
# Largest difference between two gradients of a parameter, relative to their norm; a wrong kernel's
# is about 1. Rounding to bfloat16 makes 0.03, and with experts 0.34, since it also sends tokens to
# other experts (docs/LOG.md).
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
EXPERTS_FACTOR = 8
UPDATE_TOLERANCE = 0.01  # likewise, of the weights' movements in an update


class Rows(Protocol):
    """What is asked of a dataset; see dataset/lm_dataset.py."""

    @property
    def num_bytes_in_use(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitems__(self, rows: list[int]) -> Any: ...
    def to(self, device: torch.device) -> Any: ...


class Differs(ValueError):
    """A fast path gave other results than the plain path."""


def make_fast(run: Run, data: Rows, one_pass: Pass) -> None:
    """Switch on what is faster on this machine, and choose the micro-batch.

    Afterwards weights, optimizer and random generators are as before.

    Args: one_pass: adds a batch's gradients, times a factor, to the model's; returns its sums.
    Raises: SettingsError if a path fails and --strict_fast_path is 1; OutOfMemoryError if not even
        one row fits."""
    failed = filter(None, os.environ.pop(WITHOUT, "").split(", "))
    run.fast_paths |= dict.fromkeys(failed, "failed, and the device with it")
    with forked_generators(run.device):
        if all(distributed.gather(fits_on_device(run, data))):
            undo = partial(data.to, torch.device("cpu"))
            attempt(run, ROWS_ON_DEVICE, partial(move_rows, data, run.device), undo)
        undo = partial(use_plain_steps, run.optimizer)
        attempt(run, FUSED_OPTIMIZER, partial(compare_updates, run), undo)
        if all(distributed.gather(has_kernel_within_documents(run))):
            switch = partial(setattr, run.model, "attends_within")
            try_kernel(run, ATTENTION, switch, data, one_pass)
        if run.config.use_moe and has_grouped_kernel(run.device.type, run.args.torch_dtype):
            switch = partial(switch_experts, run.model)
            try_kernel(run, EXPERTS, switch, data, one_pass)
        choose_micro_batch(run, data, one_pass)


def attempt(run: Run, name: str, work: Callable[[], object], undo: Callable[[], object]) -> None:
    """Do ``work`` unless this run has to do without. If it fails on any rank, ``undo`` it on all,
    and report it."""
    if name in run.fast_paths:
        undo()
        return log(f"note: {name} {run.fast_paths[name]}, and is not used")
    try:
        distributed.on_all_ranks(work)
        run.fast_paths[name] = "used"
    except Exception as error:
        memory = name == MICRO_BATCH and is_out_of_memory(error)
        if memory or hasattr(error, "exit_status"):  # no fault of the path
            raise
        reason = reason_of(error)
        if run.args.strict_fast_path:
            raise SettingsError(f"--strict_fast_path 1: {name} failed: {reason}") from error
        run.fast_paths[name] = reason
        log(
            f"warning: {name} failed, so the run does without, more slowly: {reason}. "
            f"Please report this line as an issue."
        )
        if any(distributed.gather(is_lost(run.device))):
            start_again(run)
        undo()


def is_lost(device: torch.device) -> bool:
    """Whether the device refuses all further work of this process, as after an illegal access."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def start_again(run: Run) -> None:
    """Replace this process, and every other rank's, by one that does without what failed."""
    log("note: the device takes no more work from this process: starting again")
    os.environ[WITHOUT] = ", ".join(run.plain_paths())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# ------------------------------------------------------------------------------ rows, optimizer


def fits_on_device(run: Run, data: Rows) -> bool:
    """Whether rows can be made where they are used, so that nothing there waits for the host."""
    if run.device.type != "cuda" or run.args.num_workers:
        return False
    return data.num_bytes_in_use < DATA_SHARE * (free_bytes(run.device) or 0)


def move_rows(data: Rows, device: torch.device) -> None:
    """Move the corpus to the device. Raises: Differs if rows are then others than before."""
    rows = [0, 1, len(data) - 1, len(data)]  # the last one is all padding
    on_host = data.__getitems__(rows)
    on_device = data.to(device).__getitems__(rows)
    for name, expected in on_host.model_inputs.items():
        found = on_device.model_inputs[name]
        if torch.is_tensor(expected) and not torch.equal(found.cpu(), expected):
            raise Differs(f"{name} of rows {rows} differ from those made on the host")


def compare_updates(run: Run) -> None:
    """Compare two updates of a copy of one layer with those of torch's plain loop.

    A third one, which is not finite, must change nothing. Raises: Differs."""
    build = OPTIMIZERS[run.args.optimizer]
    fast = copied_layer(run)
    plain = copy.deepcopy(fast)
    before = [parameter.detach().clone() for parameter in fast.parameters()]
    rate, dtype = run.args.learning_rate, run.args.torch_dtype
    tuning = run.args.tuning()
    optimizers = [build(model, rate, dtype, tuning) for model in (fast, plain)]
    use_plain_steps(optimizers[1])
    generator = torch.Generator().manual_seed(0)
    finite = torch.zeros(1, device=run.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for factor in (1.0, 0.1):
        for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
            gradient = factor * torch.randn(one.shape, generator=generator)
            one.grad, other.grad = gradient.to(one), gradient.to(other)
        for optimizer in optimizers:
            step_if_finite(optimizer, scaler, finite, finite[0])
    moved = [
        [now.detach() - start for now, start in zip(model.parameters(), before, strict=True)]
        for model in (fast, plain)
    ]
    names = [name for name, _ in fast.named_parameters()]
    check_equal(dict(zip(names, moved[1], strict=True)), moved[0], UPDATE_TOLERANCE)
    kept = [tensor.clone() for tensor in tensors_of(fast, optimizers[0])]
    for parameter in fast.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step_if_finite(optimizers[0], scaler, finite, finite[0] * torch.nan)
    if not all(map(torch.equal, kept, tensors_of(fast, optimizers[0]))):
        raise Differs("an update that is not finite was applied")


def copied_layer(run: Run) -> nn.Module:
    """A copy of the first layer, under the names that tell an optimizer what it is."""
    layers = nn.ModuleList([copy.deepcopy(run.model.model.layers[0])])
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})


# -------------------------------------------------------------------------- kernels of the layers


def has_kernel_within_documents(run: Run) -> bool:
    """Whether torch should have a kernel for ``attend_within``: on NVIDIA's GPUs since 2020, in 16
    bits, without dropout."""
    args = run.args
    if run.device.type != "cuda" or args.torch_dtype == torch.float32:
        return False
    new_enough = torch.cuda.get_device_capability(run.device) >= (8, 0)
    return bool(new_enough and args.packing and not args.dropout)


def switch_experts(model: nn.Module, on: bool) -> None:
    """Multiply groups of tokens by a kernel, or one by one."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.uses_kernel = on


def try_kernel(
    run: Run, name: str, switch: Callable[[bool], object], data: Rows, one_pass: Pass
) -> None:
    """Switch a kernel on if it works, and gives the gradients of a pass that does without."""

    def work() -> None:
        rows = range(PROBE_ROWS)
        with residual_weights_drawn(run.model):
            switch(False)
            expected = gradients(run, data, one_pass, rows)
            switch(True)
            check_pass(run, expected, gradients(run, data, one_pass, rows))

    attempt(run, name, work, partial(switch, False))


def chooses_by_memory(device: torch.device) -> bool:
    """Whether a pass that takes too much memory fails; on a CPU the system kills the process."""
    return device.type != "cpu"


def choose_micro_batch(run: Run, data: Rows, one_pass: Pass) -> None:
    """Choose the number of rows per pass; with --use_compile 1, of compiled passes."""

    def of_rows(num_rows: int) -> Tensor:
        return one_pass(data.__getitems__([*range(num_rows)]), 1.0)

    def fit() -> None:
        if chooses_by_memory(run.device):
            fit_micro_batch(run, of_rows, free_bytes(run.device))

    def compile_and_fit() -> None:
        keep_compiled_code(run.args.cache_dir)
        silence_compiler()
        run.model.compile_parts()
        fit()
        if not run.args.dropout:  # whose draws compiled code makes in its own way
            distributed.on_all_ranks(compare_compiled)

    def compare_compiled() -> None:
        rows, part = range(run.micro_batch), largest_divisor(run.micro_batch, run.micro_batch // 8)
        with residual_weights_drawn(run.model):
            found = gradients(run, data, one_pass, rows)
            with torch.compiler.set_stance("force_eager"):
                expected = gradients(run, data, one_pass, rows, at_once=part)
        check_pass(run, expected, found)

    if run.args.use_compile:
        attempt(run, COMPILED, compile_and_fit, run.model.uncompile_parts)
    if not run.model.is_compiled:
        attempt(run, MICRO_BATCH, fit, run.reset_micro_batch)


# ------------------------------------------------------------------------------------ comparison


def forked_generators(device: torch.device) -> AbstractContextManager[None]:
    """A context at whose end the random generators are as they were at its start."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def residual_weights_drawn(model: nn.Module) -> Generator[None]:
    """Draw the weights that are initially zero, for a while: behind them, gradients would be zero,
    whatever a kernel computes."""
    weights = [m.weight for m in model.modules() if isinstance(m, ResidualLinear)]
    weights += [m.down_proj for m in model.modules() if isinstance(m, Experts)]
    before = [weight.detach().clone() for weight in weights]
    generator = torch.Generator(weights[0].device).manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight += torch.empty_like(weight).normal_(std=0.02, generator=generator)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def gradients(
    run: Run, data: Rows, one_pass: Pass, rows: range, at_once: int | None = None
) -> dict[str, Tensor]:
    """The sums and the gradients of a pass, ``at_once`` rows at a time; dropout draws the same."""
    size = at_once or len(rows)
    batches = [data.__getitems__([*rows[i : i + size]]) for i in range(0, len(rows), size)]
    num_labels = max(1, sum(batch.num_labels for batch in batches))
    run.optimizer.zero_grad(set_to_none=True)
    with forked_generators(run.device):
        sums = [one_pass(batch, batch.num_labels / num_labels) for batch in batches]
    found = {"the losses": torch.stack(sums).sum(0)}
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            found[f"the gradient of {name}"] = parameter.grad
    run.optimizer.zero_grad(set_to_none=True)
    return found


def check_pass(run: Run, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raises: Differs if two passes give more different gradients than rounding explains."""
    factor = EXPERTS_FACTOR if run.config.use_moe else 1
    check_equal(expected, found.values(), TOLERANCE[run.args.torch_dtype] * factor)


def check_equal(expected: dict[str, Tensor], found: Iterable[Tensor], tolerance: float) -> None:
    """Raises: Differs naming the tensor whose relative difference is largest, if above tolerance.

    What is not finite in ``expected``, as float16 may overflow, cannot be compared."""
    pairs = [(a.float(), b.float()) for a, b in zip(expected.values(), found, strict=True)]
    norms = torch.stack([a.norm() for a, _ in pairs])
    least = norms.nan_to_num(posinf=0).max() * 1e-6  # what is nearly zero is all rounding
    differences = torch.stack([(a - b).norm() for a, b in pairs]) / norms.clamp(min=least)
    differences = torch.where(norms.isfinite(), differences, 0).nan_to_num(nan=torch.inf)
    largest, index = differences.max(0)
    if largest > tolerance:
        name = [*expected][int(index)]
        raise Differs(
            f"{name} differs by {largest:.2g} of its norm, expected {tolerance:g} at most"
        )
