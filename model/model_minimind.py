"""MiniMind's language model: the network and its loss, in native PyTorch.

The architecture is that of Qwen3 and Qwen3-MoE, so transformers' own classes can load the weights.
They also generate the text (model/generation.py).

Shapes:
    B  rows (sequences) in a batch        H   query heads         E  experts
    T  tokens per row                     K   key/value heads     k  experts used per token
    D  hidden_size                        Dh  head_dim            F  feed-forward width
    V  vocabulary size                    N   B * T, tokens in a batch
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MiniMindConfig
from model.documents import Visibility, attend_by_mask, attend_within, visibility
from model.generation import generating_model

__all__ = ["MiniMindConfig", "MiniMindForCausalLM"]  # imported from here, as in MiniMind

IGNORE = -100  # a label that carries no loss, as in torch.nn.CrossEntropyLoss
WIDTH_OF_PLAIN_EMBEDDING = 256  # above it, initial embeddings are smaller; see _init_weights


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with ``x`` (any shape): autocast's if enabled, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def activation(name: str) -> Any:
    """transformers' activation of this name; silu, the default, without importing all of them."""
    if name == "silu":
        return F.silu
    from transformers.activations import ACT2FN

    return ACT2FN[name]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 or wider.

    The output has the ``product_dtype`` of its weight: autocast need not cast for each product."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps)
        return y.to(product_dtype(self.weight))


class ResidualLinear(nn.Linear):
    """A projection into the residual stream, initially zero: each block starts as the identity.

    docs/LOG.md has the measured gain. Source: Goyal et al. 2017, 5.1, for residual networks."""


def joined_weights(dtype: torch.dtype, *layers: nn.Linear) -> Tensor:
    """The weights of several layers as one matrix (sum of out, in), for one product instead of
    several: it reads its input once, and keeps a GPU busier. The layers keep their own weights, so
    that files and optimizers know nothing of it."""
    return torch.cat([layer.weight.to(dtype) for layer in layers])


class GateUp(torch.autograd.Function):
    """Two linear layers without bias as one product, and their gradients as two.

    One product of both gradients would first have to copy them into one tensor. On an H200 that
    costs a feed-forward 8 % (docs/BENCHMARKS.md).

    Args: x: (N, D); gate, up: weights (F, D), of x's dtype. Returns: two views, each (N, F)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, gate, up)
        return F.linear(x, torch.cat((gate, up))).chunk(2, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (x, *weights), (of_gate, of_up) = ctx.saved_tensors, gradients
        of_x = torch.addmm(of_gate @ weights[0], of_up, weights[1])
        return of_x, of_gate.T @ x, of_up.T @ x


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines, each (max_position_embeddings, Dh / 2) float32.

    Pair i of a head rotates by theta ** (-2i / Dh) radians per position. The tables follow from the
    configuration, so they are neither saved in checkpoints nor sent between ranks.
    Source: RoFormer (Su et al. 2021), section 3.4.2."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, 1.0 / config.rope_theta ** (pairs / config.head_dim))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B or 1, T) int64 -> cosines and sines, each (B or 1, T, 1, Dh / 2)."""
        return self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + Dh / 2) of x by its position's angle.

    x (B, T, heads, Dh); cos and sin (B or 1, T, 1, Dh / 2) -> (B, T, heads, Dh)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head's queries and keys."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        num_kv = config.num_key_value_heads
        self.num_heads = [config.num_attention_heads, num_kv, num_kv]  # of queries, keys, values
        width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = ResidualLinear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Visibility) -> Tensor:
        """x (B, T, D) -> (B, T, D); ``rope``: cosines and sines, as from ``RotaryEmbedding``."""
        weight = joined_weights(product_dtype(x), self.q_proj, self.k_proj, self.v_proj)
        heads = F.linear(x, weight).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2K, Dh)
        q, k, v = heads.split(self.num_heads, dim=2)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if visible.bounds is None:
            y = attend_by_mask(q, k, v, visible.mask, self.dropout if self.training else 0.0)
        else:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            y = attend_within(q, k, v, visible.bounds, x.shape[1])
        return self.o_proj(y.to(x.dtype).reshape(*x.shape[:2], -1))  # not view: strides vary


class FeedForward(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)). Source: GLU variants (Shazeer 2020)."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        dtype, tokens = product_dtype(x), x.flatten(0, 1)
        weights = self.gate_proj.weight.to(dtype), self.up_proj.weight.to(dtype)
        gate, up = GateUp.apply(tokens.to(dtype), *weights)
        return self.down_proj(self.act(gate) * up).view_as(x)


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor, use_kernel: bool = True) -> Tensor:
    """Multiply each group of x's rows by a different matrix.

    Below compute capability 9, torch's kernel for bfloat16 asks the device for the sizes itself.

    Args:
        x: (N * k, in), rows sorted by group.
        weight: (E, out, in), one matrix per group.
        sizes: (E,) int64, the number of rows of each group.
        use_kernel: whether to use torch's kernel for it, if there is one.
    Returns: (N * k, out)."""
    device, dtype = x.device.type, product_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if device == "cuda":
        # On sm_100 the kernel leaves the gradient of an empty group unset (pytorch issue 172439).
        weight = torch.where((sizes > 0)[:, None, None], weight, 0)
    use_kernel &= all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if use_kernel and has_grouped_kernel(device, dtype):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=sizes.cumsum(0).to(torch.int32))
    return product_by_product(x, weight, sizes)


@torch.compiler.disable  # a graph would hold for these very sizes
def product_by_product(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """``grouped_linear`` without a kernel: the host has to wait for the sizes."""
    groups = zip(x.split(sizes.tolist()), weight, strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in groups])


def has_grouped_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups in one call; False here only costs speed."""
    if device == "cpu" and dtype == torch.float32:
        return not torch.compiler.is_compiling()
    return dtype == torch.bfloat16 and device != "mps"


class Dispatch(torch.autograd.Function):
    """Copies of tokens, sorted by expert: ``tokens[order // k]``.

    Autograd alone would add the gradients up by atomics, in any order; here each is fetched.

    Args: tokens: (N, D); order, inverse: (N * k,) int64 permutations, of each other; k.
    Returns: (N * k, D)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return tokens[order // k]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,), (gradient,) = ctx.saved_tensors, gradients
        return gradient[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class Collect(torch.autograd.Function):
    """The way back: ``y[inverse]``. Args: y: (N * k, D); as ``Dispatch``. Returns: (N * k, D)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,), (gradient,) = ctx.saved_tensors, gradients
        return gradient[order], None, None


class Experts(nn.Module):
    """SwiGLU weights of all experts, stacked so that each projection is one grouped product.

    ``state_dict`` has MiniMind's names, a matrix per expert: ``experts.0.gate_proj.weight``, ..."""

    PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
    uses_kernel = True  # False: see grouped_linear

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        num, dim, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(num, width, dim))
        self.up_proj = nn.Parameter(torch.empty(num, width, dim))
        self.down_proj = nn.Parameter(torch.empty(num, dim, width))
        self.act = activation(config.hidden_act)
        self.register_state_dict_post_hook(Experts._unstack)
        self.register_load_state_dict_pre_hook(Experts._stack)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """x (N * k, D), sorted by expert, sizes (E,), see ``grouped_linear`` -> (N * k, D)."""
        dtype = product_dtype(x)
        both = torch.cat((self.gate_proj.to(dtype), self.up_proj.to(dtype)), dim=1)  # (E, 2F, D)
        gate, up = grouped_linear(x, both, sizes, self.uses_kernel).chunk(2, dim=-1)
        return grouped_linear(self.act(gate) * up, self.down_proj, sizes, self.uses_kernel)

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
    """Routes each token to its k most probable experts and sums their weighted outputs."""

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
        # Sorted by expert, in the order of tokens: no loop, and no wait for the device.
        slots = torch.arange(used.numel(), device=x.device)
        experts = torch.arange(self.num_experts, device=x.device)
        chosen = used.flatten() == experts[:, None]  # (E, N * k)
        sizes = chosen.sum(1)  # (E,)
        place = chosen.cumsum(1) - 1 + (sizes.cumsum(0) - sizes)[:, None]  # in its expert's rows
        inverse = (place * chosen).sum(0)  # (N * k,), where each slot's token goes
        order = torch.empty_like(slots).scatter(0, inverse, slots)
        y = self.experts(Dispatch.apply(tokens, order, inverse, self.num_used), sizes)
        y = Collect.apply(y, order, inverse)
        y = (y.view(*used.shape, -1) * weight.unsqueeze(-1)).sum(1).to(x.dtype)
        by_row = x.shape[:2]
        return y.view_as(x), probs.view(*by_row, -1), used.view(*by_row, -1)


def balance_losses(probs: Tensor, sent: Tensor, real: Tensor, num_labels: Tensor) -> Tensor:
    """Load-balancing loss of L routers: k for one that spreads tokens evenly over the experts.

    Computed within each row, so that it does not depend on which rows share a micro-batch.

    Args:
        probs: (L, B, T, E), the routers' probabilities.
        sent: (L, B, T, E), 1 where an expert was chosen, 0 on padding.
        real: (B, T) bool, False on padding.
        num_labels: (B,) int64, the weights of the rows in the mean.
    Returns: (L,), mean over rows of E * sum over experts of (share of tokens) * (mean probability).
    Source: Switch Transformers (Fedus et al. 2021), section 2.2."""
    num_real = real.sum(1).clamp(min=1).unsqueeze(-1)  # (B, 1)
    row_share = num_labels.to(probs.dtype) / num_labels.sum().clamp(min=1)  # (B,)
    mean_prob = (probs * real.unsqueeze(-1)).sum(2) / num_real  # (L, B, E)
    by_row = (sent.sum(2) / num_real * mean_prob).sum(-1)  # (L, B)
    return probs.shape[-1] * (row_share * by_row).sum(-1)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Visibility
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B, T, D) -> x (B, T, D) and, with experts, the router's probabilities and choices."""
        y = self.self_attn(self.input_layernorm(x), rope, visible)
        x = x + self.dropout(y).to(x.dtype)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoEFeedForward):
            y, *routing = self.mlp(normed)
        else:
            y, routing = self.mlp(normed), []
        return x + self.dropout(y).to(x.dtype), routing


class MiniMindModel(nn.Module):
    """Embedding, blocks, final norm."""

    residual_dtype: torch.dtype | None = None  # of the stream between blocks; None: the weights'

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, visible: Visibility) -> tuple[Tensor, list[list[Tensor]]]:
        """input_ids (B, T) -> hidden states (B, T, D), and each block's routing, see ``Block``."""
        x = self.dropout(self.embed_tokens(input_ids)).to(self.residual_dtype)
        rope = self.rotary(visible.positions)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, rope, visible)
            routings.append(routing)
        return self.norm(x), routings


def shifted(labels: Tensor) -> Tensor:
    """(B, T) -> (B, T): each label at the position that predicts it, IGNORE at the row's end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def next_token_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of each token given the tokens before it.

    Args:
        logits: (B, T, V) float; position t scores the token at t + 1.
        labels: (B, T) int64, unshifted; IGNORE (-100) carries no loss.
    Returns: () float32 or wider, nats, summed: only the caller knows the window's number of labels.
    Source: the factorised objective of GPT-2 (Radford et al. 2019), section 2."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, shifted(labels).flatten(), ignore_index=IGNORE, reduction="sum")


def nats_of_each(logits: Tensor, labels: Tensor) -> Tensor:
    """As ``next_token_nats``, which it can replace, but (B, T): position t has those of t + 1."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    targets = shifted(labels)
    nats = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE, reduction="none")
    return nats.view_as(targets)


@dataclass
class CausalLMOutput:
    """Output of the model; only ``logits`` if no labels are given."""

    logits: Tensor  # (B, T, V)
    nats: Tensor | None = None  # () summed, or (B, T), see nats_of_each
    loss: Tensor | None = None  # () mean nats per label, 0 if no label carries loss
    aux_loss: Tensor | None = None  # () weighted balance loss of all layers, 0 without experts
    expert_load: Tensor | None = None  # (E,) float32, tokens per expert, without padding


class MiniMindForCausalLM(nn.Module):
    """The language model in training; its weights have MiniMind's names.

    The forward pass has no KV cache. Text is generated by transformers' Qwen3 class, which shares
    these weights: see ``generate`` and model/generation.py."""

    attends_within = False  # True: by a kernel of newer GPUs, see attend_within; not with dropout
    generation_compared = False  # set by generating_model
    is_compiled = False  # set by compile_parts

    def __init__(self, config: MiniMindConfig | None = None) -> None:
        super().__init__()
        self.config = config or MiniMindConfig()
        self.model = MiniMindModel(self.config)
        self.num_experts = self.config.num_experts if self.config.use_moe else 0
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.next_token_nats = next_token_nats  # an attribute, so that it can be replaced
        self.apply(self._init_weights)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.zeros_(self.lm_head.weight)  # at first, all tokens are equally probable

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.lm_head.weight.device

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile each block, and the loss, separately.

        All blocks share one graph, so it is compiled once. Ranks can send a block's gradients as
        soon as its backward pass is done; one graph for all would deliver them only at its end."""
        for layer in self.model.layers:
            layer.compile(backend=backend, dynamic=False)
        self.is_compiled, self.eager_nats = True, self.next_token_nats
        self.next_token_nats = torch.compile(self.eager_nats, backend=backend, dynamic=False)

    def uncompile_parts(self) -> None:
        """Run eagerly again."""
        for layer in self.model.layers:
            layer._compiled_call_impl = None  # torch has no public way back
        if self.is_compiled:
            self.is_compiled, self.next_token_nats = False, self.eager_nats

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, ResidualLinear):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            # As the blocks begin as the identity and the output head has the same weights, a token
            # gives itself a logit of std * D: far above ln V, it would begin by predicting itself.
            wide = self.config.hidden_size / WIDTH_OF_PLAIN_EMBEDDING
            nn.init.normal_(module.weight, std=std / max(1.0, wide))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_proj, std=std)
            nn.init.normal_(module.up_proj, std=std)
            nn.init.zeros_(module.down_proj)  # as ResidualLinear

    def tensors_for_qwen(self) -> dict[str, Tensor]:
        """The weights under transformers' names. They share memory with the model, except for the
        experts' ``gate_up_proj`` (E, 2F, D), which joins two of their three projections."""
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
                joined = torch.cat((module.gate_proj, module.up_proj), dim=1)
                state[f"{name}.gate_up_proj"] = joined.detach()
                state[f"{name}.down_proj"] = module.down_proj.detach()
        return state

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts (B, T) int64: transformers' ``generate``, its arguments and its result.

        Raises: GenerationError if the installed transformers computes something else."""
        return generating_model(self).generate(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_starts: Tensor | None = None,
        max_documents: int | None = None,
    ) -> CausalLMOutput:
        """Score the next token at each position; with labels, compute the losses as well.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, unshifted; IGNORE (-100) carries no loss.
            document_starts: (B, T) int64, for packed rows: the index in the row at which each
                token's document begins, -1 on padding. Tokens attend only to their own document.
            max_documents: an upper bound on the batch's documents and runs of padding, see
                ``document_bounds``; it lets attention skip pairs of different documents.
        """
        visible = visibility(input_ids, document_starts, max_documents, self.attends_within)
        hidden, routings = self.model(input_ids, visible)
        out = CausalLMOutput(self.lm_head(hidden))
        if labels is None:
            return out

        num_labels = (shifted(labels) != IGNORE).sum(1)  # (B,)
        out.nats = self.next_token_nats(out.logits, labels)
        out.loss = out.nats.sum() / num_labels.sum().clamp(min=1)
        real = labels != IGNORE if document_starts is None else document_starts >= 0
        out.aux_loss = hidden.new_zeros(())
        out.expert_load = hidden.new_zeros(self.num_experts, dtype=torch.float32)
        if self.num_experts:  # all layers at once: few kernels
            probs, used = (torch.stack(part) for part in zip(*routings, strict=True))
            sent = F.one_hot(used, self.num_experts).sum(3) * real.unsqueeze(-1)  # (L, B, T, E)
            losses = balance_losses(probs, sent, real, num_labels)
            out.aux_loss = losses.sum() * self.config.router_aux_loss_coef
            out.expert_load = sent.sum((0, 1, 2)).to(torch.float32)
        return out
