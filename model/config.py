"""The configuration of the network: its sizes, as a transformers configuration."""

import math
from typing import Any

from transformers import PretrainedConfig


class MiniMindConfig(PretrainedConfig):
    """Sizes of the network, under MiniMind's names.

    Raises: ValueError for sizes that are incompatible."""

    model_type = "minimind"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 8,
        use_moe: bool | int = False,
        *,
        vocab_size: int = 6400,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "silu",
        dropout: float = 0.0,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        inference_rope_scaling: bool = False,
        initializer_range: float = 0.02,
        num_experts: int = 4,
        num_experts_per_tok: int = 1,
        moe_intermediate_size: int | None = None,
        norm_topk_prob: bool = True,
        router_aux_loss_coef: float = 5e-4,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool | int = True,
        **kwargs,
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
        common: dict[str, Any] = {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "tie_word_embeddings": bool(tie_word_embeddings),
        }
        super().__init__(**common, **kwargs)

    def _check(self, head_dim: int | None) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, expected at least 1.")
        if head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {heads}. "
                f"Choose a multiple of {heads}."
            )
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}. "
                f"Each key/value head must serve the same number of attention heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim} (hidden_size {self.hidden_size}, {heads} heads), but "
                f"rotary embedding rotates pairs of channels. Choose an even head_dim."
            )
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, expected 1 to num_experts, "
                f"which is {self.num_experts}."
            )
