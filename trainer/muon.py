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
    y, shape = y.reshape(-1, *y.shape[-2:]), y.shape  # as torch.baddbmm takes it
    a, b, c = COEFFICIENTS
    if dtype == torch.float32 and y.shape[-1] >= 2 * y.shape[-2]:
        y = polynomial_of(y @ y.mT) @ y
    else:
        for _ in range(NUM_STEPS):
            gram = y @ y.mT
            # Sums inside the products, as passes over memory of their own take time.
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            y = torch.baddbmm(y, factor, y, beta=a)
    y = y.reshape(shape)
    return y if wide else y.mT


def polynomial_of(gram: Tensor) -> Tensor:
    """What the whole iteration multiplies a matrix by, from its product with its transpose.

    All its products are of the shorter side; of long matrices that takes half the time. It loses
    more digits, so it is for float32."""
    a, b, c = COEFFICIENTS
    total = None
    for step in range(NUM_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        total = factor if total is None else factor @ total
        if step < NUM_STEPS - 1:
            gram = factor @ gram @ factor
    assert total is not None
    return total


class Muon(torch.optim.AdamW):
    """Updates parameter groups that have a ``momentum`` by Muon, and the others by fused AdamW.

    Unlike torch.optim.Muon, it stacks matrices of the same shape, for dozens of large products
    instead of hundreds of small ones, accepts the stacked weights of experts, and skips a
    non-finite update without a device sync. A test compares the two.

    Args:
        groups: parameter groups; one with ``momentum`` holds only matrices (..., r, c). Unless its
            ``row_beta2`` is 0, their rows move equally far, on average over about
            1 / (1 - row_beta2) of their moves. Each moves in every ``period``-th update, as far as
            in so many, and takes turns with others of its shape; its momentum follows every
            gradient.
        dtype: of the matrix products.
    Source: rows' second moments are those of NorMuon (Li et al. 2025, arXiv 2510.05491)."""

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], dtype: torch.dtype
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.dtype = dtype
        self.update = 0  # the number of the next one: it decides whose turn it is

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

        def write(old: Tensor, new: Tensor, targets: list[Tensor]) -> None:
            new = new if found_inf is None else torch.where(found_inf > 0, old, new)
            torch._foreach_copy_(targets, list(new))

        period = group["period"]
        turn = slice(self.update % period, None, period)  # of the matrices of a shape
        lr = group["lr"] * period
        for shape, (parameters, gradients) in by_shape.items():
            states = [self.state[p] for p in parameters]
            moments = moments_of(group, parameters[0].detach())
            for state in states:
                if not state:
                    state["step"] = gradients[0].new_zeros(())  # AdamW requires it on loading
                    state |= {name: torch.zeros_like(like) for name, like in moments.items()}
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1.0)
            if found_inf is not None:
                # A list, although all are the same: the host would read a single tensor's value.
                torch._foreach_sub_(steps, [found_inf.reshape(()).to(torch.float32)] * len(steps))
            grad, momenta = torch.stack(gradients), [state["momentum"] for state in states]
            old = torch.stack(momenta)
            momentum = old.lerp(grad, 1 - group["momentum"])
            write(old, momentum, momenta)

            parameters, states = parameters[turn], states[turn]
            if not parameters:
                continue
            nesterov = grad[turn].lerp(momentum[turn], group["momentum"])
            direction = orthogonalize(nesterov, self.dtype)
            if group["row_beta2"]:
                direction = direction.to(grad.dtype)
                squares = [state["row_square"] for state in states]
                old = torch.stack(squares)
                row_square = old.lerp(
                    direction.square().mean(-1, keepdim=True), 1 - group["row_beta2"]
                )
                write(old, row_square, squares)
                direction = with_equal_rows(direction, row_square)
            weights = torch.stack([p.detach() for p in parameters])
            rate = lr * ADAMW_RMS * math.sqrt(max(shape[-2:]))
            moved = weights * (1 - lr * group["weight_decay"]) - rate * direction
            write(weights, moved, parameters)


def moments_of(group: dict, parameter: Tensor) -> dict[str, Tensor]:
    """Tensors like those that a group keeps for a parameter, by name, besides the step count."""
    if "momentum" not in group:
        return {"exp_avg": parameter, "exp_avg_sq": parameter}
    rows = {"row_square": parameter[..., :1]} if group["row_beta2"] else {}
    return {"momentum": parameter} | rows


def with_equal_rows(x: Tensor, row_square: Tensor) -> Tensor:
    """Divide each row by its running root mean square, and keep each matrix's norm.

    As the norm is kept, a factor that is common to all rows, as of moments that start at zero,
    does not matter.

    Args: x: (..., r, c); row_square: (..., r, 1)."""
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / row_square.sqrt().clamp(min=1e-8)
    return x * (norm / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-8))
