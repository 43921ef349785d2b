"""The share of an update that its bare matrix products take: what no rearrangement can save.

    python -m bench.products --preset demo --device cpu --turns 15

An update of the trainer's own loop is recorded; then updates and loops over the same products, of
the same sizes, layouts and types, take turns. What is left is everything else: attention,
elementwise operations, copies, the optimizer.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.measuring import NoGuard, Parts, parser, surroundings, train
from dataset.lm_dataset import Batch
from trainer.progress import Outcome
from trainer.run import Run

aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default]


class Recorder(TorchDispatchMode):
    """Keeps each matrix product: the operation, and tensors like its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], list[Any]]] = []
        self.like: dict[tuple, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run the operation, and record it if it is a product."""
        if func in PRODUCTS:
            self.calls.append((func, [self.imitate(x) for x in args]))
        return func(*args, **kwargs or {})

    def imitate(self, x: Any) -> Any:
        """A tensor of the same shape, strides and type, one for all that are alike."""
        if not torch.is_tensor(x):
            return x
        if not x.is_floating_point():
            return x.clone()
        key = (x.shape, x.stride(), x.dtype)
        if key not in self.like:
            self.like[key] = torch.empty_strided(
                x.shape, x.stride(), dtype=x.dtype, device=x.device
            ).normal_()
        return self.like[key]

    def replay(self) -> None:
        """All products, one after another."""
        with torch.no_grad():
            for func, args in self.calls:
                func(*args)

    def num_flops(self) -> int:
        """Their operations, by torch's own count."""
        with FlopCounterMode(display=False) as counter:
            self.replay()
        return counter.get_total_flops()


class InTurn(NoGuard):
    """Records the second update, then times updates and bare products in turn."""

    def __init__(self, turns: int) -> None:
        self.turns, self.updates = turns, 0
        self.recorder = Recorder()
        self.seconds: list[tuple[float, float]] = []  # of an update, of its products

    def step(self, run: Run, window: list[Batch], num_labels: int) -> Outcome:
        """One update, as in ``train_step``, and after the second one its products alone."""
        self.updates += 1
        if self.updates < 3:
            with self.recorder if self.updates == 2 else contextlib.nullcontext():
                return Parts().step(run, window, num_labels)
        if len(self.seconds) == self.turns:
            raise SystemExit(0)
        began = time.perf_counter()
        outcome = Parts().step(run, window, num_labels)
        outcome.grad_norm.item()  # waits for the device
        between = time.perf_counter()
        self.recorder.replay()
        torch.ones(1, device=run.device).item()
        self.seconds.append((between - began, time.perf_counter() - between))
        return outcome


def main() -> None:
    """Measure, and print the shares."""
    cli = parser(__doc__)
    cli.add_argument("--preset", default="demo")
    cli.add_argument("--dtype", help="None: the device's")
    cli.add_argument("--turns", type=int, default=15)
    args = cli.parse_args()
    guard = InTurn(args.turns)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", args.preset, "--device", args.device, "--epochs", "1000"]
        words += ["--save_dir", folder, "--cache_dir", folder, "--eval_interval", "1000000"]
        words += ["--use_compile", "0"] + (["--dtype", args.dtype] if args.dtype else [])
        try:
            train(words, guard, Parts(step=guard.step))
        except SystemExit as end:
            if end.code:
                raise
    shares = sorted(products / update for update, products in guard.seconds)
    update, products = (statistics.median(part) for part in zip(*guard.seconds, strict=True))
    flops = guard.recorder.num_flops()
    print(surroundings(args, "bench.products"))
    print(
        f"\nan update {1000 * update:.1f} ms, its {len(guard.recorder.calls)} products alone "
        f"{1000 * products:.1f} ms: {statistics.median(shares):.0%} ({shares[0]:.0%} to "
        f"{shares[-1]:.0%}); {flops / products / 1e9:,.0f} GFLOP/s in the "
        f"products, {flops / update / 1e9:,.0f} in the update"
    )


if __name__ == "__main__":
    main()
