"""Continuing texts: transformers' own Qwen3 and Qwen3-MoE, on the tensors that were trained.

Our network is theirs by contract, so the KV cache, sampling, prompts padded on the left and
stretched positions need no code of ours. What this relies on is compared when a model is opened:
a release of transformers that computes something else is named, and no text comes of it.

Shapes as in model_minimind.py."""

from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from model.config import MiniMindConfig

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"),
)
MOE_SIZES = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob",
             "router_aux_loss_coef")
STRETCHED = {  # 16 times 2,048 positions, as in MiniMind
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048,
    "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0,
}
CLOSE = 1e-3  # share of the scores by which two ways of adding up may differ; rounding: some 1e-6
NUM_PROMPT, NUM_STEPS = 24, 8  # tokens that the comparison reads and generates

QwenModel = Qwen3ForCausalLM | Qwen3MoeForCausalLM


class GenerationError(ValueError):
    """The installed transformers does not compute what was trained, or nothing can be computed with
    these weights; no text was generated."""

    exit_status = 4


class TrainedModel(Protocol):
    """MiniMindForCausalLM, as far as it is used here."""

    config: MiniMindConfig
    training: bool
    generation_compared: bool

    @property
    def device(self) -> torch.device: ...
    def tensors_for_qwen(self) -> dict[str, Tensor]: ...
    def train(self, mode: bool) -> nn.Module: ...
    def eval(self) -> "TrainedModel": ...
    def __call__(self, input_ids: Tensor) -> Any: ...


def qwen_config(config: MiniMindConfig, stretched: bool = False) -> Qwen3Config | Qwen3MoeConfig:
    """The same architecture in transformers' words; ``stretched``: positions, by YaRN."""
    sizes = {name: getattr(config, name) for name in SIZES} | {"tie_word_embeddings": True}
    rope: dict[str, Any] = {"rope_type": "default"}
    if stretched:
        rope = STRETCHED
        sizes["max_position_embeddings"] = 16 * 2048  # whatever the model's own tables hold
    sizes["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    if config.use_moe:
        return Qwen3MoeConfig(**sizes, **{name: getattr(config, name) for name in MOE_SIZES})
    return Qwen3Config(**sizes)


def build_qwen(model: TrainedModel, stretched: bool = False) -> QwenModel:
    """transformers' class, holding the model's own tensors, on its device."""
    config = qwen_config(model.config, stretched)
    with torch.device("meta"):  # no memory, and no time for weights that are replaced
        if isinstance(config, Qwen3MoeConfig):
            qwen = Qwen3MoeForCausalLM(config)
        else:
            qwen = Qwen3ForCausalLM(config)
    qwen.load_state_dict(model.tensors_for_qwen(), assign=True)
    rotary = type(qwen.model.rotary_emb)  # no file holds its tables, so they are built again
    qwen.model.rotary_emb = rotary(config).to(model.device)
    return qwen.eval()


def generating_model(model: TrainedModel) -> QwenModel:
    """What continues texts with these weights; compared with the model when first asked for.

    It shares the tensors, so later updates show in it; of a mixture of experts only in part, see
    ``tensors_for_qwen``. ``config.inference_rope_scaling`` stretches its positions.

    Raises: GenerationError if what it computes is something else, or cannot be computed."""
    was_training = model.training
    try:
        if not model.generation_compared:
            compare(model.eval(), build_qwen(model))
            model.generation_compared = True
        return build_qwen(model, stretched=model.config.inference_rope_scaling)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # parts that have moved
        reason = str(error).strip().split("\n")[0]
        raise unusable(f"cannot continue it ({type(error).__name__}: {reason:.160})") from error
    finally:
        model.train(was_training)


@torch.no_grad()
def compare(model: TrainedModel, qwen: QwenModel) -> None:
    """Compare the scores of a whole row, and of tokens generated one by one from the cache.

    Raises: GenerationError."""
    generator = torch.Generator().manual_seed(0)  # not the run's own
    num_prompt = max(1, min(NUM_PROMPT, model.config.max_position_embeddings - NUM_STEPS))
    ids = torch.randint(model.config.vocab_size, (1, num_prompt), generator=generator)
    ids = ids.to(model.device)
    out = qwen.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_STEPS,
        min_new_tokens=NUM_STEPS, output_logits=True, return_dict_in_generate=True
    )
    expected = model(out.sequences[:, :-1]).logits  # (1, T, V)
    if not torch.isfinite(expected).all():
        raise GenerationError("the model's own scores are not finite, so it cannot continue texts. "
                              "Choose other weights")
    found = {
        "a whole row": qwen(out.sequences[:, :-1]).logits,
        "tokens generated one by one": torch.stack(out.logits, dim=1),
    }
    for what, scores in found.items():
        own = expected[:, -scores.shape[1] :].float()
        difference = (scores.float() - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12)
        # The median: where two experts score alike, rounding may choose the other one.
        if not difference.median() < CLOSE:
            raise unusable(f"gives {what} other scores than the model (by {difference.median():.2g}"
                           f" of their size)")


def unusable(what: str) -> GenerationError:
    """The one line: what was found, with which versions, and the way out."""
    return GenerationError(
        f"transformers {transformers.__version__} (with torch {torch.__version__}) {what}, so what "
        f"it continues would be wrong. Install the versions that were tried: pip install -r "
        f"requirements.txt"
    )
