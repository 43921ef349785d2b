"""Run a program of this project on the null GPU, and report what its updates asked of the device.

    python -m tests.null_gpu.run REPORT PROGRAM [FLAG ...]      # PROGRAM: train_pretrain, eval_llm

The report is JSON: for each update the launches, the operations of its matrix products, and what
made the host wait; then what was compiled, and the peak of memory. No kernel computes anything, so
whoever compares results is told here that they are equal.
"""

import contextlib
import ctypes
import importlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedTokenizerBase

from model import generation, model_minimind
from trainer import fast_paths, run
from trainer.distributed import is_main_process

LIBRARY = ctypes.CDLL(None)  # preloaded
CALLS = itertools.count()


def take_counts() -> dict[str, tuple[int, float]]:
    """Calls, and bytes or operations, by name, since the last call."""
    with tempfile.NamedTemporaryFile(mode="r") as file:
        LIBRARY.null_gpu_write(file.name.encode())
        LIBRARY.null_gpu_reset()
        lines = [line.rstrip("\n").split("\t", 2) for line in file]
    return {name: (int(calls), float(work)) for calls, work, name in lines}


def summed(counts: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """What is asked of an update."""
    calls = {name: n for name, (n, _) in counts.items()}
    return {
        "launches": sum(n for name, n in calls.items() if name.split()[0] in ("KERNEL", "PRODUCT")),
        "products": sum(n for name, n in calls.items() if name.startswith("PRODUCT")),
        "product_flops": sum(w for name, (_, w) in counts.items() if name.startswith("PRODUCT")),
        "triton": sum(n for name, n in calls.items() if name.startswith("KERNEL triton")),
        "all_reduces": calls.get("NCCL all-reduce", 0),
        "waits": {
            name: n
            for name, n in calls.items()
            if name.startswith("WAIT") or name.endswith("device to host")
        },
    }


def whatever_it_finds(compare: Callable[..., None], *given: Any) -> None:
    """Compare two models whose logits mean nothing."""
    with contextlib.suppress(generation.GenerationError):
        compare(*given)


def with_made_up_sizes(
    product: Callable[..., Tensor], x: Tensor, weight: Tensor, sizes: Tensor
) -> Tensor:
    """Ask the device for the sizes, as the product would, and give it others, each time different:
    those are memory that nobody wrote."""
    sizes.tolist()
    each, moved = len(x) // len(weight), next(CALLS) % 7
    made_up = [each - moved] + [each] * (len(weight) - 2)
    return product(x, weight, torch.tensor([*made_up, len(x) - sum(made_up)]))


def in_range(ids: Any, size: int) -> Any:
    """Tokens that a tokenizer knows: those that were chosen are memory that nobody wrote."""
    if isinstance(ids, list):
        return [in_range(part, size) for part in ids]
    return in_range(ids.tolist(), size) if isinstance(ids, Tensor) else ids % size


def whatever_they_are() -> contextlib.AbstractContextManager:
    """A context in which weights that nobody wrote, and which may be any numbers, are finite."""
    return mock.patch.object(Tensor, "isfinite", lambda tensor: torch.tensor(True))


def save_whatever_they_are(save: Callable[..., None], *given: Any) -> None:
    """Save such weights."""
    with whatever_they_are():
        save(*given)


def main() -> int:
    """See the module's text. Returns: the program's exit status."""
    path, name, *argv = sys.argv[1:]
    program = importlib.import_module(name)
    updates: list[dict[str, Any]] = []
    updates_are_made = name == "train_pretrain"
    if updates_are_made:
        step = program.train_step

        def counted(*given: Any) -> Any:
            take_counts()
            outcome = step(*given)
            updates.append(summed(take_counts()))
            return outcome

        program.train_step = counted
    torch.equal = lambda a, b: True
    fast_paths.check_equal = lambda *given: None
    generation.compare = partial(whatever_it_finds, generation.compare)
    decode = PreTrainedTokenizerBase.decode
    PreTrainedTokenizerBase.decode = lambda tokenizer, token_ids, **named: decode(
        tokenizer, in_range(token_ids, len(tokenizer)), **named
    )
    run.save_weights = partial(save_whatever_they_are, run.save_weights)
    by_sizes = model_minimind.product_by_product
    made_up = partial(with_made_up_sizes, by_sizes)
    model_minimind.product_by_product = torch.compiler.disable(made_up)
    more = itertools.cycle([True, True, False])  # tokens after the first; a device would tell
    GenerationMixin._has_unfinished_sequences = lambda *given, **named: next(more)
    with contextlib.nullcontext() if updates_are_made else whatever_they_are():
        status = program.main(argv)
    from torch._dynamo.utils import counters

    report = {
        "updates": updates,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    if is_main_process():
        Path(path).write_text(json.dumps(report, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
