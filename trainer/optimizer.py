"""The optimizers: how each is built, stepped and restored."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.muon import MOMENTUM, Muon

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict]:
    """The matrices by name, which get weight decay, and the group of all other parameters."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return matrices, {"params": vectors, "weight_decay": 0.0}


def adamw(model: nn.Module, learning_rate: float, dtype: torch.dtype) -> torch.optim.AdamW:
    """Fused AdamW, with the betas and weight decay of GPT-3 (Brown et al. 2020), appendix B."""
    matrices, vectors = parameter_groups(model)
    groups = [{"params": list(matrices.values()), "weight_decay": WEIGHT_DECAY}, vectors]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def muon(model: nn.Module, learning_rate: float, dtype: torch.dtype) -> Muon:
    """Muon, computing in ``dtype``, for the layers' matrices except routers; AdamW for the rest."""
    matrices, vectors = parameter_groups(model)
    names = [n for n in matrices if ".layers." in n and not n.endswith("mlp.gate.weight")]
    hidden = [matrices.pop(name) for name in names]
    groups = [
        {"params": list(matrices.values()), "weight_decay": WEIGHT_DECAY},
        vectors,
        {"params": hidden, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM},
    ]
    return Muon(groups, learning_rate, BETAS, dtype)


# By name. Each must skip an update if ``found_inf`` is set. Of torch's implementations, only the
# fused ones do so.
OPTIMIZERS: dict[str, Callable[[nn.Module, float, torch.dtype], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


def build_optimizer(
    model: nn.Module, learning_rate: float, kind: str = "adamw", dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """The optimizer called ``kind``; ``dtype`` is that of the run's matrix products.

    Raises: ValueError if it would apply a non-finite gradient."""
    if not skips_bad_updates(OPTIMIZERS[kind]):
        raise ValueError(
            f"--optimizer {kind} ignores found_inf, so a NaN gradient would reach the weights. "
            f"Expected an optimizer that skips such an update, as fused AdamW does."
        )
    return OPTIMIZERS[kind](model, learning_rate, dtype)


@functools.cache
def skips_bad_updates(build: Callable) -> bool:
    """Whether an optimizer changes nothing if ``found_inf`` is set.

    Tests it with a good and a bad update of a toy model on the CPU, without random numbers."""
    layer = nn.ParameterDict({"weight": torch.ones(4, 4), "bias": torch.ones(4)})
    toy = nn.ModuleDict({"model": nn.ModuleDict({"layers": layer})})
    optimizer = build(toy, 1e-3, torch.float32)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = []
    try:
        for value in (1.0, torch.nan):
            before = [tensor.clone() for tensor in tensors_of(toy, optimizer)]
            for parameter in toy.parameters():
                parameter.grad = torch.full_like(parameter, value)
            step_if_finite(optimizer, scaler, torch.zeros(1), torch.tensor(value))
    except (AssertionError, RuntimeError):  # torch refuses to run it
        return False
    return all(map(torch.equal, before, tensors_of(toy, optimizer)))


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors that an update changes: weights, moments and step counts."""
    states = (state.values() for state in optimizer.state.values())
    return [*model.parameters(), *(t for state in states for t in state if torch.is_tensor(t))]


def moments_of(group: dict) -> list[str]:
    """Names of the tensors that a group keeps for each parameter, besides the step count."""
    return ["momentum"] if "momentum" in group else ["exp_avg", "exp_avg_sq"]


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, sums: Tensor, grad_norm: Tensor
) -> None:
    """Apply the gradients if ``sums`` and ``grad_norm`` are finite; otherwise change nothing.

    The fused kernel decides on the device, by the flag that GradScaler also uses, so the host does
    not wait. An enabled scaler sets the flag itself, from the same gradients."""
    found_inf = (~torch.isfinite(sums.sum() + grad_norm)).to(torch.float32)
    if not getattr(optimizer, "takes_plain_steps", False):
        optimizer.found_inf = found_inf  # pyrefly: ignore[missing-attribute]  # undeclared in torch
        scaler.step(optimizer)
    elif not found_inf:  # here the host waits
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def use_plain_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's loop over tensors take the steps from now on; the state stays the same."""
    for group in optimizer.param_groups:
        group["fused"] = group["foreach"] = False
    vars(optimizer)["takes_plain_steps"] = True
    # Undeclared in torch: an enabled GradScaler now decides on the host, too.
    vars(optimizer)["_step_supports_amp_scaling"] = False


def expected_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Example tensors with the names, shapes and types of the optimizer's saved state."""
    expected: list[dict[str, Tensor]] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            expected.append({"step": torch.tensor(0.0)} | dict.fromkeys(moments_of(group), p))
    return dict(enumerate(expected))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore moments and step counts, but keep this run's weight decay and implementation.

    Optimizer.load_state_dict alone would also restore the file's ``fused``."""
    own = optimizer.state_dict()["param_groups"]
    for group, group_saved in zip(own, saved["param_groups"], strict=True):
        group["lr"] = float(group_saved["lr"])  # until the next update sets it
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of the next update, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
