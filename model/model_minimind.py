"""MiniMind's language model: configuration, network and loss, in native PyTorch.

Aligned with Qwen3 and Qwen3-MoE, so that both load our weights under MiniMind's names. What a model
needs around its network (configuration files, text generation, the KV cache) is transformers'.

Shapes:
    B  rows (sequences) in a batch        H   query heads         E  experts
    T  tokens in a row                    K   key/value heads     k  experts a token uses
    D  hidden_size                        Dh  head_dim            F  feed-forward width
    V  vocabulary                         N   B * T, all tokens of a batch
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

IGNORE = -100  # a label that carries no loss, as everywhere in PyTorch


class MiniMindConfig(PretrainedConfig):
    """Sizes of the network; names as in MiniMind.

    Raises: ValueError for sizes that do not fit together."""

    model_type = "minimind"

    def __init__(
        self, hidden_size: int = 768, num_hidden_layers: int = 8, use_moe: bool = False, *,
        vocab_size: int = 6400, num_attention_heads: int = 8, num_key_value_heads: int = 4,
        head_dim: int | None = None, intermediate_size: int | None = None, hidden_act: str = "silu",
        dropout: float = 0.0, max_position_embeddings: int = 32768, rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6, inference_rope_scaling: bool = False,
        initializer_range: float = 0.02, num_experts: int = 4, num_experts_per_tok: int = 1,
        moe_intermediate_size: int | None = None, norm_topk_prob: bool = True,
        router_aux_loss_coef: float = 5e-4, bos_token_id: int = 1, eos_token_id: int = 2,
        pad_token_id: int = 0, tie_word_embeddings: bool = True, **kwargs
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.use_moe = bool(use_moe)
        self.vocab_size = vocab_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or math.ceil(hidden_size * math.pi / 64) * 64
        self.hidden_act = hidden_act
        self.dropout = dropout
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.inference_rope_scaling = inference_rope_scaling
        self.initializer_range = initializer_range
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.router_aux_loss_coef = router_aux_loss_coef
        self._check(head_dim)
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings, **kwargs
        )

    def _check(self, head_dim: int | None) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into {heads} attention heads. "
                f"Choose a multiple of {heads}."
            )
        if heads % kv_heads:
            raise ValueError(
                f"{heads} attention heads do not share {kv_heads} key/value heads evenly. "
                f"num_key_value_heads must divide num_attention_heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim} (hidden_size {self.hidden_size}, {heads} heads), but "
                f"rotary embedding turns pairs of numbers. Choose an even one."
            )
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but a token can use "
                f"1 to {self.num_experts} experts (num_experts)."
            )


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products with ``x`` are done: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 or wider.

    Its output is of the products' type: autocast would cast it anew for each of them."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps)
        return y.to(product_dtype(x))


def inverse_frequencies(config: MiniMindConfig) -> Tensor:
    """Radians by which each pair of a head turns from one position to the next.

    With ``inference_rope_scaling`` slow pairs are stretched to 16 times 2,048 positions (YaRN).

    Returns: (Dh / 2,) float32.
    Source: RoFormer (Su et al. 2021), section 3.4.2; YaRN (Peng et al. 2023), section 3.2."""
    dim, base = config.head_dim, config.rope_theta
    plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if not config.inference_rope_scaling:
        return plain

    trained_positions, stretch, fast_turns, slow_turns = 2048, 16, 32, 1

    def pair_that_turns(turns: int) -> float:
        return dim * math.log(trained_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(fast_turns)), 0)
    high = min(math.ceil(pair_that_turns(slow_turns)), dim // 2 - 1)
    stretched_share = ((torch.arange(dim // 2, device="cpu") - low) / max(high - low, 0.001)).clamp(
        0, 1
    )
    return plain * (1 - stretched_share) + plain / stretch * stretched_share


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines, (max_position_embeddings, Dh / 2) float32.

    They follow from the configuration, so no checkpoint holds them and no rank sends them."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_position_embeddings, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)
        self.fill_tables()

    @torch.no_grad()
    def fill_tables(self) -> None:
        """Compute both tables, again when transformers built the model on the meta device."""
        positions = torch.arange(
            self.config.max_position_embeddings, dtype=torch.float32, device="cpu"
        )
        angles = torch.outer(positions, inverse_frequencies(self.config))
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B or 1, T) int64 -> cosines and sines, each (B or 1, 1, T, Dh / 2)."""
        return self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + Dh / 2) of x (B, heads, T, Dh) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def document_mask(document_starts: Tensor) -> Tensor:
    """Which tokens each token sees: those of its own document, up to itself.

    Args: document_starts: (B, T) int64, where in the row each token's document begins.
    Returns: (B, 1, T, T) bool, True where the row's token attends to the column's."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    not_later = index[None, None, :] <= index[None, :, None]  # (1, T, T)
    not_before = index[None, None, :] >= document_starts[:, :, None]  # (B, T, T)
    return (not_later & not_before).unsqueeze(1)


def document_bounds(document_starts: Tensor, most: int) -> Tensor:
    """Where each document begins and ends in the batch's tokens, row after row.

    Its shape follows from ``most`` alone, so that compiled code serves every batch and the host
    need not wait to hear how many there are.

    Args:
        document_starts: (B, T) int64, as in ``document_mask``; a stretch of -1 is padding.
        most: at least as many documents and stretches of padding as there are, counted by row.
    Returns: (most + 1,) int32, ascending from 0; what is left over is B * T."""
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    padding = document_starts < 0
    begins = (document_starts == index) | (padding & ~F.pad(padding[:, :-1], (1, 0)))
    num = begins.numel()
    position = torch.arange(num, device=begins.device)
    found = torch.where(begins.flatten(), position, num).sort().values[:most]
    return F.pad(found, (0, most + 1 - found.numel()), value=num).to(torch.int32)


def attend_within(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Causal attention inside each document; other pairs are never computed.

    Args: q: (N, H, Dh); k, v: (N, K, Dh); bounds: as ``document_bounds``; longest: T.
    Returns: (N, H, Dh)."""
    shared_by = q.shape[1] // k.shape[1]  # torch 2.11 has no enable_gqa here
    k, v = k.repeat_interleave(shared_by, 1), v.repeat_interleave(shared_by, 1)
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))


@functools.cache
def can_attend_within(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this device has that kernel for these sizes, and it gives what the mask gives.

    Tried once, forward and backward: which cards, types and widths it takes differs by release."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    starts = torch.tensor([[0] * 5 + [5] * 11, [0] * 9 + [-1] * 7], device=device)
    generator = torch.Generator(device).manual_seed(0)  # not the run's own
    shape = (3, 2, 16, 2, head_dim)  # q, k, v; B, T, H, Dh
    x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    results = []
    try:
        for masked in (True, False):
            parts = [part.clone().requires_grad_() for part in x]
            if masked:
                q, k, v = (part.float().transpose(1, 2) for part in parts)
                mask = document_mask(starts) | torch.eye(16, dtype=torch.bool, device=device)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
            else:
                flat = [part.flatten(0, 1) for part in parts]
                y = attend_within(*flat, document_bounds(starts, 8), 16).view(shape[1:])
            real = (starts >= 0)[..., None, None]
            (y.float() * real).square().sum().backward()
            results.append([y.float() * real, *(part.grad.float() for part in parts)])
    except RuntimeError:  # no such kernel; a wrong call would be a TypeError, and be seen
        return False
    return all(torch.allclose(a, b, atol=0.1, rtol=0.1) for a, b in zip(*results, strict=True))


def cache_mask(
    num_new: int, num_past: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which cached and new tokens each new token sees during generation.

    Args: attention_mask: (B, past + new), 0 on padding, or None.
    Returns: (B or 1, 1, new, past + new) bool, or None where plain causality says it all."""
    if attention_mask is None and (num_past == 0 or num_new == 1):
        return None
    keys = torch.arange(num_past + num_new, device=device)
    queries = keys[num_past:, None]
    mask = (keys <= queries)[None, None]
    if attention_mask is not None:
        # Padding sees itself: a softmax over nothing is NaN, and NaN spreads even at weight zero.
        mask = (mask & attention_mask[:, None, None, :].bool()) | (keys == queries)
    return mask


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head's queries and keys."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        width, kv_width = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
        cache: DynamicCache | None, bounds: Tensor | None = None
    ) -> Tensor:
        by_head = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(by_head)).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_norm(self.k_proj(x).view(by_head)).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if bounds is not None:
            q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
            return self.o_proj(attend_within(q, k, v, bounds, x.shape[1]).view(*x.shape[:2], -1))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if x.device.type == "cpu":  # its kernel is faster in float32, see docs/LOG.md
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                dropout_p=self.dropout if self.training else 0.0, enable_gqa=True
            )
        return self.o_proj(y.to(x.dtype).transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)). Source: GLU variants (Shazeer 2020)."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
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


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
        cache: DynamicCache | None, bounds: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (B, T, D) -> x, and what the router did (see ``MoEFeedForward``) or None."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache, bounds))
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoEFeedForward):
            y, *routing = self.mlp(normed)
        else:
            y, routing = self.mlp(normed), None
        return x + self.dropout(y), routing


class MiniMindModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None,
        cache: DynamicCache | None, bounds: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids (B, T) -> hidden states (B, T, D), and each expert layer's routing."""
        x = self.dropout(self.embed_tokens(input_ids))
        rope = self.rotary(position_ids)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, rope, mask, cache, bounds)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings


def shifted(labels: Tensor) -> Tensor:
    """labels (B, T) -> what each position predicts: the label after it, IGNORE at the row's end."""
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


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """What the model returns; ``expert_load`` (E,) float32 counts real tokens, over all layers."""

    expert_load: Tensor | None = None


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: weights under MiniMind's names, generation by transformers."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    attends_within = False  # see can_attend_within; dropout of attention needs the other way
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig | None = None) -> None:
        super().__init__(config or MiniMindConfig())
        self.model = MiniMindModel(self.config)
        self.num_experts = self.config.num_experts if self.config.use_moe else 0
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.next_token_nats = next_token_nats
        self.post_init()  # initialises (below) and ties lm_head to the embedding

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile each layer, and the loss, by itself.

        All layers share one code, which is made once. And a layer's gradients are there as soon as
        it is done, so that ranks can send them; the whole compiled at once hands out all at its
        end."""
        for layer in self.model.layers:
            layer.compile(backend=backend, dynamic=False)
        self.next_token_nats = torch.compile(next_token_nats, backend=backend, dynamic=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RotaryEmbedding):
            module.fill_tables()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: DynamicCache | None = None,
        use_cache: bool = False, labels: Tensor | None = None,
        document_starts: Tensor | None = None, max_documents: int | None = None,
        logits_to_keep: int | Tensor = 0, **kwargs
    ) -> CausalLMOutput:
        """Score the next token at each position, and the labels if given.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, past + T), 0 on padding: for prompts of unequal length.
            position_ids: (B, T) int64; if absent, counted from the document's or row's start.
            past_key_values, use_cache: transformers' KV cache.
            labels: (B, T) int64, unshifted; IGNORE (-100) carries no loss.
            document_starts: (B, T) int64, for packed rows: where in the row each token's document
                begins, -1 on padding. A token attends to its own document alone.
            max_documents: at least as many as the rows hold, counted by row, and their stretches
                of padding; where the device can, attention then skips what lies between documents.
            logits_to_keep: how many of the last positions to score, or which; 0 for all.
        Returns:
            ``loss`` () mean nats per label, 0 if none carries loss; ``aux_loss`` () the experts'
            imbalance, weighted; ``logits`` (B, T, V); ``past_key_values``."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        index = torch.arange(num_past, num_past + input_ids.shape[1], device=input_ids.device)
        mask = bounds = None
        if document_starts is not None:
            if self.attends_within and max_documents is not None:
                bounds = document_bounds(document_starts, max_documents)
            else:
                mask = document_mask(document_starts)
            position_ids = index - document_starts
        else:
            mask = cache_mask(input_ids.shape[1], num_past, attention_mask, input_ids.device)
        if position_ids is None:
            position_ids = index.unsqueeze(0)
        hidden, routings = self.model(
            input_ids, position_ids, mask, past_key_values if use_cache else None, bounds
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])  # (B, T, V)

        loss, aux_loss, expert_load = None, hidden.new_zeros(()), None
        if labels is not None:
            num_labels = (shifted(labels) != IGNORE).sum(1)  # (B,)
            loss = self.next_token_nats(logits, labels) / num_labels.sum().clamp(min=1)
            real = labels != IGNORE if document_starts is None else document_starts >= 0
            expert_load = hidden.new_zeros(self.num_experts, dtype=torch.float32)
            for probs, used in routings:
                aux_loss = aux_loss + balance_loss(probs, used, real, num_labels)
                sent = F.one_hot(used, self.num_experts).sum(2) * real.unsqueeze(-1)  # (B, T, E)
                expert_load = expert_load + sent.sum((0, 1))
            aux_loss = aux_loss * self.config.router_aux_loss_coef
        return CausalLMOutput(
            loss=loss, aux_loss=aux_loss, logits=logits,
            past_key_values=past_key_values if use_cache else None, expert_load=expert_load
        )
