"""Feed-forward layers: SwiGLU, and a mixture of experts without a loop.

Shapes as in model_minimind.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from model.attention import ResidualLinear, product_dtype
from model.config import MiniMindConfig


class FeedForward(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)). Source: GLU variants (Shazeer 2020)."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of x's rows with its own matrix.

    Args:
        x: (N, in), rows sorted by group.
        weight: (E, out, in), one matrix a group.
        ends: (E,) int32, where each group ends in x.
    Returns: (N, out)."""
    device, dtype = x.device.type, product_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    has_kernel = dtype == torch.bfloat16 and device != "mps"
    has_kernel |= (device, dtype) == ("cpu", torch.float32) and not torch.compiler.is_compiling()
    if has_kernel and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    sizes = ends.diff(
        prepend=ends.new_zeros(1)
    ).tolist()  # waits for the device: other types have no kernel
    return torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(sizes), weight, strict=True)])


class Experts(nn.Module):
    """The experts' SwiGLU weights, stacked for one multiplication per projection.

    Files keep MiniMind's names, one matrix an expert: ``experts.0.gate_proj.weight`` and so on."""

    PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        num, dim, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(num, width, dim))
        self.up_proj = nn.Parameter(torch.empty(num, width, dim))
        self.down_proj = nn.Parameter(torch.empty(num, dim, width))
        self.act = ACT2FN[config.hidden_act]
        self.register_state_dict_post_hook(Experts._unstack)
        self.register_load_state_dict_pre_hook(Experts._stack)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (N, D) sorted by expert, ends (E,) as in ``grouped_linear`` -> (N, D)."""
        gate = self.act(grouped_linear(x, self.gate_proj, ends))
        return grouped_linear(gate * grouped_linear(x, self.up_proj, ends), self.down_proj, ends)

    @staticmethod
    def _unstack(module: "Experts", state: dict, prefix: str, metadata: dict) -> None:
        for name in Experts.PROJECTIONS:
            for i, weight in enumerate(state.pop(prefix + name)):
                state[f"{prefix}{i}.{name}.weight"] = weight

    @staticmethod
    def _stack(module: "Experts", state: dict, prefix: str, *args) -> None:
        for name in Experts.PROJECTIONS:
            keys = [f"{prefix}{i}.{name}.weight" for i in range(len(getattr(module, name)))]
            if all(key in state for key in keys):
                state[prefix + name] = torch.stack([state.pop(key) for key in keys])


class MoEFeedForward(nn.Module):
    """Sends each token through its likeliest experts and adds their outputs, weighted."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.num_experts, self.num_used = config.num_experts, config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> output (B, T, D), probabilities (B, T, E), experts used (B, T, k)."""
        tokens = x.flatten(0, 1)  # (N, D)
        logits = self.gate(tokens)
        probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)  # (N, E)
        weight, used = probs.topk(self.num_used, dim=-1)  # (N, k)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        # Sorted by expert, each one's tokens lie together: no loop, no question to the device.
        order = used.flatten().argsort(stable=True)  # (N * k,)
        ends = (
            (used.flatten()[:, None] == torch.arange(self.num_experts, device=x.device))
            .sum(0)
            .cumsum(0)
        )
        y = self.experts(tokens[order // self.num_used], ends.to(torch.int32))[order.argsort()]
        y = (y.view(*used.shape, -1) * weight.unsqueeze(-1)).sum(1).to(x.dtype)
        by_row = x.shape[:2]
        return y.view_as(x), probs.view(*by_row, -1), used.view(*by_row, -1)


def balance_loss(probs: Tensor, used: Tensor, real: Tensor, num_labels: Tensor) -> Tensor:
    """How unevenly a layer's router spreads tokens over the experts; k when evenly.

    Measured within each row, so that it does not depend on which rows share a micro-batch.

    Args:
        probs: (B, T, E) the router's probabilities.
        used: (B, T, k) int64, the experts chosen.
        real: (B, T) bool, False on padding.
        num_labels: (B,) int64, the weight of each row.
    Returns: (), mean over rows of E * sum over experts of (share of tokens) * (mean probability).
    Source: Switch Transformers (Fedus et al. 2021), section 2.2."""
    num_experts = probs.shape[-1]
    real = real.unsqueeze(-1).to(probs.dtype)  # (B, T, 1)
    num_real = real.sum(1).clamp(min=1)  # (B, 1)
    row_share = num_labels.to(probs.dtype) / num_labels.sum().clamp(min=1)  # (B,)
    sent = (F.one_hot(used, num_experts).sum(2) * real).sum(1) / num_real  # (B, E)
    mean_prob = (probs * real).sum(1) / num_real  # (B, E)
    return num_experts * (row_share * (sent * mean_prob).sum(-1)).sum()
