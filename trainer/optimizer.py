"""AdamW as it is used for language models."""

import torch
from torch import nn

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


def build_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone; one fused kernel where there is one.

    Source: betas and decay of GPT-3 (Brown et al. 2020), appendix B."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = matrices[0].device.type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore moments and step counts; rates, decay and kernels stay those of this run.

    Optimizer.load_state_dict alone would also take over the file's ``fused``."""
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Use ``lr`` for the next update, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
