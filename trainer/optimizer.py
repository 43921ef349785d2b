"""AdamW as it is used for language models, or Muon beside it."""

import torch
from torch import Tensor, nn

from trainer.muon import MOMENTUM, Muon

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


def build_optimizer(
    model: nn.Module, learning_rate: float, kind: str = "adamw",
    dtype: torch.dtype = torch.bfloat16
) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone, in one fused kernel; or with ``kind``
    muon, Muon for the layers' matrices but the routers'.

    Args: dtype: of Muon's products.
    Source: betas and decay of GPT-3 (Brown et al. 2020), appendix B."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    vectors = [p for p in model.parameters() if p.ndim < 2]
    hidden = []
    if kind == "muon":
        names = [n for n in matrices if ".layers." in n and not n.endswith("mlp.gate.weight")]
        hidden = [matrices.pop(name) for name in names]
    groups = [
        {"params": list(matrices.values()), "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
    groups.append({"params": hidden, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM})
    return Muon(groups, learning_rate, BETAS, dtype)


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, sums: Tensor, grad_norm: Tensor
) -> None:
    """Apply the gradients, unless one of these tensors is not finite: then nothing changes.

    The fused kernel decides it on the device, by the flag that GradScaler made for it, so that
    nobody waits. A scaler sets the flag itself, from the same gradients."""
    optimizer.found_inf = (~torch.isfinite(sums.sum() + grad_norm)).to(torch.float32)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def expected_state(optimizer: torch.optim.AdamW) -> dict[int, dict[str, Tensor]]:
    """What the optimizer's saved state looks like, by names, shapes and types."""
    expected: list[dict[str, Tensor]] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = ["momentum"] if "momentum" in group else ["exp_avg", "exp_avg_sq"]
            expected.append({"step": torch.tensor(0.0)} | dict.fromkeys(moments, p))
    return dict(enumerate(expected))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore moments and step counts; decay and kernels stay those of this run.

    Optimizer.load_state_dict alone would also take over the file's ``fused``."""
    own = optimizer.state_dict()["param_groups"]
    for group, group_saved in zip(own, saved["param_groups"], strict=True):
        group["lr"] = float(group_saved["lr"])  # of the last update, until the next sets its own
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Use ``lr`` for the next update, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
