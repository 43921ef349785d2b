"""How many rows a device works on at once: enough to keep it busy, no more than its memory holds.

The updates stay the same: a window's rows are only cut into other micro-batches.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from trainer import distributed
from trainer.console import log
from trainer.errors import is_out_of_memory
from trainer.run import Run, largest_divisor

MOST_TOKENS = 2**17  # at once; an estimate: from there on products of matrices are large enough
SHARE_OF_MEMORY = 0.8  # the rest is for what a pass needs for a moment, and for gaps
OPTIMIZER_BYTES = 12  # a parameter: gradient and two moments in float32


def free_bytes(device: torch.device) -> int | None:
    """What a device has left; None where that is unknown: MPS shares its memory with all else."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def choose_micro_batch(run: Run, one_pass: Callable[[int], Tensor]) -> None:
    """Set the run's micro-batch so that its memory suffices; what the run draws does not change.

    Args: one_pass: forward and backward of so many rows. Raises: as ``fit_micro_batch``."""
    if run.device.type != "cpu":  # there the system kills who takes too much: no try would fail
        drawing = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(drawing):
            fit_micro_batch(run, one_pass, free_bytes(run.device))


def fit_micro_batch(run: Run, one_pass: Callable[[int], Tensor], free_bytes: int | None) -> None:
    """Set the run's micro-batch to as many rows as are useful and fit, or to the flag's; if they
    turn out not to fit, halve it until they do. All ranks take the same.

    Args:
        one_pass: forward and backward of so many rows.
        free_bytes: the device's, with the model there, but neither gradients nor moments; None:
            begin with the run's own micro-batch.
    Raises: torch.OutOfMemoryError, or RuntimeError on a CPU, if not even one row fits."""
    rows = run.args.micro_batch_size
    if free_bytes is None:
        rows = run.micro_batch
    elif rows is None:
        fitting = min(distributed.gather(rows_that_fit(run, one_pass, free_bytes)))
        rows = min(MOST_TOKENS // run.args.max_seq_len, fitting)
    rows = largest_divisor(run.rows_per_device, rows)
    while error := out_of_memory(run, one_pass, rows):
        if rows == 1:
            raise error
        fewer = largest_divisor(run.rows_per_device, rows // 2)
        log(f"note: {rows:,} rows at once do not fit the memory; trying {fewer:,}")
        rows = fewer
    run.micro_batch = rows


def suggest_micro_batch(run: Run, kind: object, error: BaseException | None, trace: object) -> None:
    """When a run ends without memory: which flag makes its updates need less. For an ExitStack."""
    if error is not None and is_out_of_memory(error) and run.micro_batch > 1:
        fewer = largest_divisor(run.rows_per_device, run.micro_batch // 2)
        error.add_note(
            f"--micro_batch_size {fewer} (now {run.micro_batch}); --from_resume 1 resumes from the "
            f"last save"
        )


def rows_that_fit(run: Run, one_pass: Callable[[int], Tensor], free_bytes: int) -> int:
    """An estimate from what passes of one row and of two take.

    They run eagerly: compiled code takes less, and need not be made for these sizes."""
    with torch.compiler.set_stance("force_eager"):
        one, two = (bytes_taken(run, lambda n=n: one_pass(n)) for n in (1, 2))
    optimizer = OPTIMIZER_BYTES * sum(p.numel() for p in run.model.parameters())
    left = SHARE_OF_MEMORY * free_bytes - optimizer - (2 * one - two)  # this part rows share
    return max(1, int(left / (two - one)))


def bytes_taken(run: Run, one_pass: Callable[[], Tensor]) -> int:
    """Memory that a pass takes where its backward half begins, parameters not counted.

    That is all that it kept; and for the largest tensor, the loss's, a gradient and that of what
    it came from."""
    own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    kept = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        one_pass()
    run.optimizer.zero_grad(set_to_none=True)
    return sum(kept.values()) + 2 * max(kept.values())


def out_of_memory(run: Run, one_pass: Callable[[int], Tensor], rows: int) -> Exception | None:
    """Try it, with room taken for the optimizer's moments. Returns: how it failed, on any rank."""
    error = None
    try:
        moments = [torch.empty_like(p) for p in run.model.parameters() for _ in range(2)]
        one_pass(rows).tolist()  # waits for the device
        del moments
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        error = raised.with_traceback(None)  # its frames hold what is to be freed
    run.optimizer.zero_grad(set_to_none=True)
    if error is not None:
        gc.collect()
        getattr(torch, "mps" if run.device.type == "mps" else "cuda").empty_cache()
    if distributed.totals(error is not None)[0]:
        return error or torch.OutOfMemoryError("out of memory on another rank")
    return None
