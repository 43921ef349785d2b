"""The optimizers: how each is built, stepped and restored."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.muon import Muon, moments_of

WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Tuning:
    """What a recipe sets besides the learning rate. By default betas are those of GPT-3 (Brown et
    al. 2020, appendix B), as is WEIGHT_DECAY, and Muon is that of Jordan (2024)."""

    embedding_lr_scale: float = 1.0  # times the learning rate
    head_lr_scale: float = 1.0  # if it is not tied to the embedding
    vector_lr_scale: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    muon_momentum: float = 0.95
    muon_beta2: float = 0.0
    muon_period: int = 1
    weight_decay: float = WEIGHT_DECAY

    @property
    def betas(self) -> tuple[float, float]:
        """Of AdamW."""
        return self.adam_beta1, self.adam_beta2


def parameter_groups(model: nn.Module, tuning: Tuning) -> tuple[dict, dict[str, nn.Parameter]]:
    """The groups of embedding, head and vectors by name, and the other matrices by name."""
    embedding = {n: p for n, p in model.named_parameters() if "embed_tokens" in n}
    head = {n: p for n, p in model.named_parameters() if "lm_head" in n}  # none if it is tied
    vectors = [p for p in model.parameters() if p.ndim < 2]
    apart = embedding | head
    matrices = {n: p for n, p in model.named_parameters() if p.ndim >= 2 and n not in apart}
    groups = {
        "embedding": decaying([*embedding.values()], tuning, tuning.embedding_lr_scale),
        "head": decaying([*head.values()], tuning, tuning.head_lr_scale),
        "vectors": decaying(vectors, tuning, tuning.vector_lr_scale) | {"weight_decay": 0.0},
    }
    return groups, matrices


def decaying(parameters: list[nn.Parameter], tuning: Tuning, lr_scale: float = 1.0) -> dict:
    """A parameter group whose rate is ``lr_scale`` times the learning rate; it decays no faster."""
    decay = tuning.weight_decay / lr_scale
    return {"params": parameters, "lr_scale": lr_scale, "weight_decay": decay}


def filled(*groups: dict) -> list[dict]:
    """The groups that have a parameter. In a state, parameters are numbered in their order."""
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module, learning_rate: float, dtype: torch.dtype, tuning: Tuning
) -> torch.optim.AdamW:
    """Fused AdamW."""
    named, matrices = parameter_groups(model, tuning)
    rest = decaying([*matrices.values()], tuning)
    groups = filled(named["embedding"], named["head"], rest, named["vectors"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=tuning.betas, fused=True)


def muon(model: nn.Module, learning_rate: float, dtype: torch.dtype, tuning: Tuning) -> Muon:
    """Muon, computing in ``dtype``, for the layers' matrices except routers; AdamW for the rest."""
    named, matrices = parameter_groups(model, tuning)
    names = [n for n in matrices if ".layers." in n and not n.endswith("mlp.gate.weight")]
    hidden = [matrices.pop(name) for name in names]
    own = {"momentum": tuning.muon_momentum, "row_beta2": tuning.muon_beta2}
    groups = filled(
        named["embedding"],
        named["head"],
        decaying([*matrices.values()], tuning),
        named["vectors"],
        decaying(hidden, tuning) | own | {"period": tuning.muon_period},
    )
    return Muon(groups, learning_rate, tuning.betas, dtype)


# By name. Each must skip an update if ``found_inf`` is set. Of torch's implementations, only the
# fused ones do so.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon}


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    kind: str = "adamw",
    dtype: torch.dtype = torch.bfloat16,
    tuning: Tuning = Tuning(),
) -> torch.optim.Optimizer:
    """The optimizer called ``kind``; ``dtype`` is that of the run's matrix products.

    Raises: ValueError if it would apply a non-finite gradient."""
    if not skips_bad_updates(OPTIMIZERS[kind]):
        raise ValueError(
            f"--optimizer {kind} ignores found_inf, so a NaN gradient would reach the weights. "
            f"Expected an optimizer that skips such an update, as fused AdamW does."
        )
    return OPTIMIZERS[kind](model, learning_rate, dtype, tuning)


@functools.cache
def skips_bad_updates(build: Callable) -> bool:
    """Whether an optimizer changes nothing if ``found_inf`` is set.

    Tests it with a good and a bad update of a toy model on the CPU, without random numbers."""
    layer = nn.ParameterDict({"weight": torch.ones(4, 4), "bias": torch.ones(4)})
    toy = nn.ModuleDict({"model": nn.ModuleDict({"layers": layer})})
    optimizer = build(toy, 1e-3, torch.float32, Tuning())
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
            expected.append({"step": torch.tensor(0.0)} | moments_of(group, p))
    return dict(enumerate(expected))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore moments and step counts, but keep this run's groups with their settings.

    Optimizer.load_state_dict alone would also restore the file's ``fused``."""
    own = optimizer.state_dict()["param_groups"]
    for group, given in zip(own, saved["param_groups"], strict=False):
        if type(given.get("lr")) is float:  # a start that makes no update saves it again
            group["lr"] = given["lr"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def set_lr(optimizer: torch.optim.Optimizer, lr: float, update: int) -> float:
    """Set the learning rate and the number of the next update, and return the rate."""
    if isinstance(optimizer, Muon):
        optimizer.update = update
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
