"""Run by torchrun in test_training: the gradient of one window, computed by several ranks.

    gradient_of_ranks.py FOLDER [BATCH_SIZE ACCUMULATION_STEPS]...
"""

import sys
from pathlib import Path

import torch

from tests.gradients import window_gradient
from trainer import distributed

if __name__ == "__main__":
    folder, splits = Path(sys.argv[1]), list(map(int, sys.argv[2:]))
    distributed.init_distributed_mode("cpu")
    torch.set_num_threads(1)
    for batch_size, accumulation_steps in zip(splits[::2], splits[1::2], strict=True):
        result = window_gradient(folder, batch_size, accumulation_steps, use_moe=True)
        if distributed.is_main_process():
            torch.save(result, folder / f"{batch_size}x{accumulation_steps}.pt")
    distributed.close()
