"""Chooses the number of rows per pass: enough to keep the device busy, and no more than fit.

This does not change the updates, only how the rows of a window are split into micro-batches.
"""

import gc
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trainer import distributed
from trainer.console import log
from trainer.errors import is_out_of_memory
from trainer.run import Run, largest_divisor

MAX_TOKENS = 2**17  # per pass; an estimate of where larger matrix products stop being faster
MEMORY_FRACTION = 0.8  # the rest is for temporary tensors and fragmentation
OPTIMIZER_BYTES = 12  # per parameter: gradient and two moments in float32


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, or None if unknown: MPS shares its memory with everything else."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def fit_micro_batch(run: Run, one_pass: Callable[[int], Tensor], free_bytes: int | None) -> None:
    """Set the run's micro-batch to ``--micro_batch_size``, or else to as many rows as are useful
    and fit. If they turn out not to fit, halve them until they do. All ranks choose the same.

    Args:
        one_pass: runs forward and backward on the given number of rows.
        free_bytes: of the device, which holds the model, but no gradients or moments yet; None if
            unknown: start from the run's current micro-batch.
    Raises: torch.OutOfMemoryError, or RuntimeError on a CPU, if not even one row fits; on every
        rank if a pass fails on any."""
    rows = run.args.micro_batch_size
    if free_bytes is None:
        rows = run.micro_batch
    elif rows is None:
        estimate = partial(rows_that_fit, run, one_pass, free_bytes)
        fitting = min(distributed.gather(distributed.on_all_ranks(estimate)))
        rows = min(MAX_TOKENS // run.args.row_length, fitting)
    rows = largest_divisor(run.rows_per_device, rows)
    while error := out_of_memory(run, one_pass, rows):
        if rows == 1:
            raise error
        fewer = largest_divisor(run.rows_per_device, rows // 2)
        log(f"note: a pass of {rows:,} rows does not fit in memory; trying {fewer:,}")
        rows = fewer
    run.micro_batch = rows


def suggest_micro_batch(run: Run, kind: object, error: BaseException | None, trace: object) -> None:
    """Add a note to an out-of-memory error with a flag that needs less. An ExitStack callback."""
    if error is not None and is_out_of_memory(error) and run.micro_batch > 1:
        fewer = largest_divisor(run.rows_per_device, run.micro_batch // 2)
        error.add_note(
            f"--micro_batch_size {fewer} (now {run.micro_batch}); --from_resume 1 resumes from the "
            f"last save"
        )


def rows_that_fit(run: Run, one_pass: Callable[[int], Tensor], free_bytes: int) -> int:
    """An estimate, based on the memory of passes of one and of two rows.

    These run eagerly: compiled code needs less memory, and compiling for these sizes is a waste."""
    with torch.compiler.set_stance("force_eager"):
        one, two = (bytes_taken(run, lambda n=n: one_pass(n)) for n in (1, 2))
    optimizer = OPTIMIZER_BYTES * sum(p.numel() for p in run.model.parameters())
    fixed = 2 * one - two  # what a pass takes for any number of rows
    return max(1, int((MEMORY_FRACTION * free_bytes - optimizer - fixed) / (two - one)))


def bytes_taken(run: Run, one_pass: Callable[[], Tensor]) -> int:
    """Memory of a pass at the start of its backward half, without parameters.

    It consists of all saved tensors, and, for the largest one (of the loss), its gradient and the
    gradient of its input."""
    own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    saved_bytes = {}  # by storage

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        one_pass()
    run.optimizer.zero_grad(set_to_none=True)
    return sum(saved_bytes.values()) + 2 * max(saved_bytes.values())


def out_of_memory(run: Run, one_pass: Callable[[int], Tensor], rows: int) -> Exception | None:
    """Try a pass, with memory reserved for the moments. Returns: its error on any rank, or None."""

    def attempt() -> None:
        moments = [torch.empty_like(p) for p in run.model.parameters() for _ in range(2)]
        one_pass(rows).tolist()  # waits for the device
        del moments

    error = None
    try:
        distributed.on_all_ranks(attempt)
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        error = raised.with_traceback(None)  # its frames hold tensors that must be freed
    run.optimizer.zero_grad(set_to_none=True)
    if error is not None:
        gc.collect()
        getattr(torch, "mps" if run.device.type == "mps" else "cuda").empty_cache()
    return error
