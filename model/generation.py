"""Text generation by transformers' Qwen3 and Qwen3-MoE classes, which share the trained tensors.

Our network computes what theirs computes, so KV cache, sampling, left-padded prompts and stretched
positions need no code here. This is checked when a model is opened: if the installed transformers
computes something else, an error names its version and no text is generated.

Shapes as in model_minimind.py."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from model.config import MiniMindConfig

SIZES = (  # have the same names in MiniMindConfig and in Qwen3Config
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"),
)
MOE_SIZES = (  # likewise, in Qwen3MoeConfig
    *("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
    "router_aux_loss_coef",
)
YARN = {  # extends 2,048 positions 16 times, as in MiniMind
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
TOLERANCE = 1e-3  # relative difference of logits; rounding alone causes about 1e-6
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 24, 8  # in the comparison

# Named through the package, which imports its classes when they are used: here, at the first text.
# That takes seconds, which no start of a program should have to wait for.
QwenModel: TypeAlias = "transformers.Qwen3ForCausalLM | transformers.Qwen3MoeForCausalLM"


class GenerationError(ValueError):
    """No text was generated: the installed transformers does not compute what was trained, or the
    weights give logits that are not finite."""

    exit_status = 4


class TrainedModel(Protocol):
    """The parts of MiniMindForCausalLM that are used here; importing it would be circular."""

    config: MiniMindConfig
    model: Any
    training: bool
    generation_compared: bool

    @property
    def device(self) -> torch.device: ...
    def tensors_for_qwen(self) -> dict[str, Tensor]: ...
    def train(self, mode: bool) -> nn.Module: ...
    def eval(self) -> TrainedModel: ...
    def __call__(self, input_ids: Tensor) -> Any: ...


def qwen_config(
    config: MiniMindConfig, stretched: bool = False
) -> transformers.Qwen3Config | transformers.Qwen3MoeConfig:
    """The transformers configuration of the same network; ``stretched``: with YaRN, see above."""
    sizes = {name: getattr(config, name) for name in SIZES}
    sizes["tie_word_embeddings"] = config.tie_word_embeddings
    rope: dict[str, Any] = {"rope_type": "default"}
    if stretched:
        rope = YARN
        sizes["max_position_embeddings"] = 16 * 2048  # however many the model was trained with
    sizes["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    if config.use_moe:
        return transformers.Qwen3MoeConfig(
            **sizes, **{name: getattr(config, name) for name in MOE_SIZES}
        )
    return transformers.Qwen3Config(**sizes)


def build_qwen(model: TrainedModel, stretched: bool = False) -> QwenModel:
    """An instance of transformers' class that holds the model's own tensors, on its device."""
    config = qwen_config(model.config, stretched)
    with torch.device("meta"):  # its initial weights are replaced: they need no memory
        if isinstance(config, transformers.Qwen3MoeConfig):
            qwen = transformers.Qwen3MoeForCausalLM(config)
        else:
            qwen = transformers.Qwen3ForCausalLM(config)
    qwen.load_state_dict(model.tensors_for_qwen(), assign=True)
    if config.tie_word_embeddings:  # one parameter, or a conversion and a file would have two
        qwen.lm_head.weight = qwen.model.embed_tokens.weight
    rotary = type(qwen.model.rotary_emb)  # its tables are in no state_dict: build them here
    qwen.model.rotary_emb = rotary(config).to(model.device)
    return qwen.eval()


def generating_model(model: TrainedModel) -> QwenModel:
    """A transformers model that generates text with these weights.

    On the first call its logits are compared with the model's. It shares the tensors, so it follows
    later updates; with experts only in part, see ``tensors_for_qwen``. Its positions are stretched
    if ``config.inference_rope_scaling`` is set.

    Raises: GenerationError if it computes something else, or fails."""
    was_training = model.training
    try:
        if not model.generation_compared:
            compare(model.eval(), build_qwen(model))
            model.generation_compared = True
        return build_qwen(model, stretched=model.config.inference_rope_scaling)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
        # Its parts or its API have changed.
        reason = str(error).strip().split("\n")[0]
        raise mismatch(f"cannot run this model ({type(error).__name__}: {reason:.160})") from error
    finally:
        model.train(was_training)


@torch.no_grad()
def compare(model: TrainedModel, qwen: QwenModel) -> None:
    """Compare the logits of a whole row and of tokens generated one by one with the KV cache.

    Raises: GenerationError if they differ."""
    generator = torch.Generator().manual_seed(0)  # leaves the global one alone
    room = model.config.max_position_embeddings - NUM_NEW_TOKENS
    num_prompt_tokens = max(1, min(NUM_PROMPT_TOKENS, room))
    ids = torch.randint(model.config.vocab_size, (1, num_prompt_tokens), generator=generator)
    ids = ids.to(model.device)
    out = qwen.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        min_new_tokens=NUM_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rounded = model.model.residual_dtype  # to save time in training; transformers rounds nothing
    model.model.residual_dtype = None
    try:
        with torch.compiler.set_stance("force_eager"):  # once, in these shapes: not worth compiling
            expected = model(out.sequences[:, :-1]).logits  # (1, T, V)
    finally:
        model.model.residual_dtype = rounded
    if not torch.isfinite(expected).all():
        raise GenerationError(
            "the model's logits are not finite, so it cannot generate text. Choose other weights"
        )
    found = {
        "a whole row": qwen(out.sequences[:, :-1]).logits,
        "tokens generated one by one": torch.stack(out.logits, dim=1),
    }
    for what, logits in found.items():
        own = expected[:, -logits.shape[1] :].float()
        difference = (logits.float() - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12)
        # The median: where two experts are about equally probable, rounding may swap them.
        if not difference.median() < TOLERANCE:
            raise mismatch(
                f"computes other logits for {what} than the model (relative difference "
                f"{difference.median():.2g})"
            )


def mismatch(finding: str) -> GenerationError:
    """The error for a transformers that does not fit: finding, versions and the way out."""
    return GenerationError(
        f"transformers {transformers.__version__} (with torch {torch.__version__}) {finding}, so "
        f"no text is generated. Install tested versions: pip install -r requirements.txt"
    )
