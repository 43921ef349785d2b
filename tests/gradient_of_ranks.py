"""Run by the ranks of a test in test_training: the gradient of one window, computed by several."""

from pathlib import Path

import torch

from tests.gradients import window_gradient
from trainer import distributed


def main(argv: list[str]) -> int:
    """FOLDER [BATCH_SIZE ACCUMULATION_STEPS]..."""
    folder, splits = Path(argv[0]), list(map(int, argv[1:]))
    distributed.init_distributed_mode("cpu")
    torch.set_num_threads(1)
    distributed.BUCKET_BYTES = 2**12  # many buckets
    finish, early = distributed.GradientSum.sum_over_ranks, []
    all_reduce, works, at_once = torch.distributed.all_reduce, [], []

    def noting(gradients: distributed.GradientSum, sums: torch.Tensor) -> tuple:
        early.append(len(gradients.sent) / len(gradients.buckets))
        return finish(gradients, sums)

    def counting(tensor: torch.Tensor, **options: bool) -> torch.distributed.Work | None:
        works[:] = [work for work in works if not work.is_completed()]
        at_once.append(len(works))
        work = all_reduce(tensor, **options)
        works.extend([work] if work else [])
        return work

    distributed.GradientSum.sum_over_ranks = noting
    torch.distributed.all_reduce = counting
    ways = [(), distributed.SERIAL_BACKENDS]  # as with NCCL, and as with gloo
    for i, (batch_size, accumulation_steps) in enumerate(
        zip(splits[::2], splits[1::2], strict=True)
    ):
        distributed.SERIAL_BACKENDS = ways[i % 2]
        at_once.clear()
        result = window_gradient(folder, batch_size, accumulation_steps, use_moe=True)
        if distributed.is_main_process():
            result["sent within the backward pass"] = torch.tensor(early[-1])
            result["others on their way"] = torch.tensor(max(at_once))
            torch.save(result, folder / f"{batch_size}x{accumulation_steps}.pt")
    distributed.close()
    return 0
