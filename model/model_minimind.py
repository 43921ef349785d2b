"""MiniMind's language model: the network and its loss, in native PyTorch.

Aligned with Qwen3 and Qwen3-MoE, so that both load our weights under MiniMind's names. What a model
needs around its network (configuration files, text generation, the KV cache) is transformers'.

Shapes:
    B  rows (sequences) in a batch        H   query heads         E  experts
    T  tokens in a row                    K   key/value heads     k  experts a token uses
    D  hidden_size                        Dh  head_dim            F  feed-forward width
    V  vocabulary                         N   B * T, all tokens of a batch
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from model.attention import (
    Attention, ResidualLinear, RMSNorm, RotaryEmbedding, cache_mask, document_bounds,
    document_mask
)
from model.config import MiniMindConfig
from model.feed_forward import Experts, FeedForward, MoEFeedForward, balance_loss

__all__ = ["MiniMindConfig", "MiniMindForCausalLM"]  # found here by MiniMind's readers

IGNORE = -100  # a label that carries no loss, as everywhere in PyTorch


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
        if isinstance(module, ResidualLinear):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_proj, std=std)
            nn.init.normal_(module.up_proj, std=std)
            nn.init.zeros_(module.down_proj)  # as ResidualLinear
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
