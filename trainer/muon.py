"""Muon: orthogonalized updates for the hidden matrices, AdamW for all other parameters."""

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that moves singular values towards one
NUM_STEPS = 5
ADAMW_RMS = 0.2  # root mean square of AdamW's updates; matching it lets both use the same rate


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """For each matrix, approximately the closest one whose singular values are all one.

    The result has singular values between 0.7 and 1.2, which trains equally well.

    Args: x: (..., r, c); dtype: of the matrix products.
    Returns: a tensor of the same shape, in ``dtype``.
    Source: the Newton-Schulz iteration of Muon (Jordan 2024, kellerjordan.github.io/posts/muon)."""
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).to(dtype)  # the shorter side first makes the products smaller
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y if wide else y.mT


class Muon(torch.optim.AdamW):
    """Updates parameter groups that have a ``momentum`` by Muon, and the others by fused AdamW.

    Unlike torch.optim.Muon, it stacks matrices of the same shape, for dozens of large products
    instead of hundreds of small ones, accepts the stacked weights of experts, and skips a
    non-finite update without a device sync. A test compares the two.

    Args:
        groups: parameter groups; one with ``momentum`` holds only matrices (..., r, c).
        dtype: of the matrix products."""

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], dtype: torch.dtype
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Perform one update, unless ``found_inf`` marks it as not finite."""
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
        found_inf = getattr(self, "found_inf", None)
        for shape, (parameters, gradients) in by_shape.items():
            states = [self.state[p] for p in parameters]
            for state, parameter in zip(states, parameters, strict=True):
                if not state:
                    state["step"] = parameter.new_zeros(())  # AdamW requires it on loading
                    state["momentum"] = torch.zeros_like(parameter)
            momenta = [state["momentum"] for state in states]
            old, weights = torch.stack(momenta), torch.stack([p.detach() for p in parameters])
            grad = torch.stack(gradients)
            new = old.lerp(grad, 1 - group["momentum"])
            direction = orthogonalize(grad.lerp(new, group["momentum"]), self.dtype)
            rate = group["lr"] * ADAMW_RMS * math.sqrt(max(shape[-2:]))
            moved = weights * (1 - group["lr"] * group["weight_decay"]) - rate * direction
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1.0)
            if found_inf is not None:
                # A list, although all are the same: the host would read a single tensor's value.
                torch._foreach_sub_(steps, [found_inf.reshape(()).to(torch.float32)] * len(steps))
                bad = found_inf > 0
                new, moved = torch.where(bad, old, new), torch.where(bad, weights, moved)
            torch._foreach_copy_(momenta, list(new))
            torch._foreach_copy_(parameters, list(moved))
