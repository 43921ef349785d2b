"""The optimizers: how each is built, and what its state looks like."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.muon import MOMENTUM, Muon

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict]:
    """Matrices by name, to be decayed, and the group of all other parameters, which are not."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return matrices, {"params": vectors, "weight_decay": 0.0}


def adamw(model: nn.Module, learning_rate: float, dtype: torch.dtype) -> torch.optim.AdamW:
    """AdamW in one fused kernel, with betas and decay of GPT-3 (Brown et al. 2020), appendix B."""
    matrices, vectors = parameter_groups(model)
    groups = [{"params": list(matrices.values()), "weight_decay": WEIGHT_DECAY}, vectors]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def muon(model: nn.Module, learning_rate: float, dtype: torch.dtype) -> Muon:
    """Muon for the layers' matrices except the routers', with products of ``dtype``; AdamW for the
    rest."""
    matrices, vectors = parameter_groups(model)
    names = [n for n in matrices if ".layers." in n and not n.endswith("mlp.gate.weight")]
    hidden = [matrices.pop(name) for name in names]
    groups = [
        {"params": list(matrices.values()), "weight_decay": WEIGHT_DECAY},
        vectors,
        {"params": hidden, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM},
    ]
    return Muon(groups, learning_rate, BETAS, dtype)


# By the values of --optimizer. Whatever is added must leave out an update whose ``found_inf`` is
# set: torch's fused kernels do, its other implementations do not look at it.
OPTIMIZERS: dict[str, Callable[[nn.Module, float, torch.dtype], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


def build_optimizer(
    model: nn.Module, learning_rate: float, kind: str = "adamw", dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """The optimizer of this name; ``dtype`` is that of the run's products.

    Raises: ValueError if it would apply a gradient that is not finite."""
    if not leaves_out_bad_updates(OPTIMIZERS[kind]):
        raise ValueError(
            f"--optimizer {kind} applies a gradient although found_inf is set, so a NaN would "
            f"reach the weights. Expected one that leaves it out, as fused AdamW does."
        )
    return OPTIMIZERS[kind](model, learning_rate, dtype)


@functools.cache
def leaves_out_bad_updates(build: Callable) -> bool:
    """Whether an optimizer changes nothing when it is told that gradients are not finite.

    Tried on a layer of its own, on the CPU: a good update, then a bad one."""
    layer = nn.ParameterDict({"weight": torch.ones(4, 4), "bias": torch.ones(4)})  # nothing drawn
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
    except (AssertionError, RuntimeError):  # torch's own word that it cannot
        return False
    return all(map(torch.equal, before, tensors_of(toy, optimizer)))


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that an update changes: weights, moments, counts of steps."""
    states = (state.values() for state in optimizer.state.values())
    return [*model.parameters(), *(t for state in states for t in state if torch.is_tensor(t))]


def moments_of(group: dict) -> list[str]:
    """The names of what is kept for each parameter of a group, besides the count of steps."""
    return ["momentum"] if "momentum" in group else ["exp_avg", "exp_avg_sq"]


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, sums: Tensor, grad_norm: Tensor
) -> None:
    """Apply the gradients, unless one of these tensors is not finite: then nothing changes.

    The fused kernel decides it on the device, by the flag that GradScaler made for it, so that
    nobody waits. A scaler sets the flag itself, from the same gradients."""
    found_inf = (~torch.isfinite(sums.sum() + grad_norm)).to(torch.float32)
    optimizer.found_inf = found_inf  # pyrefly: ignore[missing-attribute]  # torch declares none
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def expected_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """What the optimizer's saved state looks like, by names, shapes and types."""
    expected: list[dict[str, Tensor]] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            expected.append({"step": torch.tensor(0.0)} | dict.fromkeys(moments_of(group), p))
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
