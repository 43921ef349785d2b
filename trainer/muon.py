"""Muon: hidden matrices move by orthogonal steps; all else by AdamW."""

import math

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that draws singular values towards one
NUM_STEPS = 5
LIKE_ADAMW = 0.2  # root mean square of AdamW's steps, so that one rate serves both


def orthogonalised(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly the closest matrix whose singular values are all one, of each matrix in a stack.

    They end between 0.7 and 1.2, which trains as well.

    Args: x: (..., r, c); dtype: of the products.
    Returns: the same shape, of ``dtype``.
    Source: the Newton-Schulz iteration of Muon (Jordan 2024, kellerjordan.github.io/posts/muon)."""
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).to(dtype)  # the shorter side first: smaller products
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y if wide else y.mT


class Muon(torch.optim.AdamW):
    """Groups with a ``momentum`` by Muon, the others by fused AdamW.

    Our own rather than torch.optim.Muon: matrices of one shape are stacked, so that a model takes
    some dozens of large products in place of some hundred small ones, experts' weights are stacks
    already, and an update that is not finite is left out without asking the device. A test
    compares the two.

    Args:
        groups: AdamW's groups; with ``momentum``, of matrices (..., r, c) alone.
        dtype: of the products."""

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], dtype: torch.dtype
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update, unless ``found_inf`` says that it is not finite."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)

    def _step_matrices(self, group: dict) -> None:
        by_shape: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameters, gradients = by_shape.setdefault(parameter.shape, ([], []))
                parameters.append(parameter)
                gradients.append(parameter.grad)
        bad = getattr(self, "found_inf", None)
        for shape, (parameters, gradients) in by_shape.items():
            states = [self.state[p] for p in parameters]
            for state, parameter in zip(states, parameters, strict=True):
                if not state:
                    state["step"] = parameter.new_zeros(())  # AdamW asks for it when it is loaded
                    state["momentum"] = torch.zeros_like(parameter)
            momenta = [state["momentum"] for state in states]
            old, weights = torch.stack(momenta), torch.stack([p.detach() for p in parameters])
            grad = torch.stack(gradients)
            new = old.lerp(grad, 1 - group["momentum"])
            moves = orthogonalised(grad.lerp(new, group["momentum"]), self.dtype)
            rate = group["lr"] * LIKE_ADAMW * math.sqrt(max(shape[-2:]))
            moved = weights * (1 - group["lr"] * group["weight_decay"]) - rate * moves
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1.0)
            if bad is not None:
                # A list, though all are the same: a single tensor would be read by the host.
                torch._foreach_sub_(steps, [bad.reshape(()).to(torch.float32)] * len(steps))
                new, moved = torch.where(bad > 0, old, new), torch.where(bad > 0, weights, moved)
            torch._foreach_copy_(momenta, list(new))
            torch._foreach_copy_(parameters, list(moved))
