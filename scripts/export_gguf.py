"""GGUF, the file format of llama.cpp and ollama, written and checked with the gguf package.

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The names of tensors come from the
package."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.model_minimind import MiniMindForCausalLM
from trainer.errors import CheckpointError, SettingsError

try:
    import gguf
except ImportError:
    raise SettingsError("--to gguf needs the gguf package: pip install gguf") from None

BLOCK = 32  # consecutive weights of a row that share a scale in q8_0
SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
# llama.cpp's names for how a text is split before merging, by whether digits are split one by one.
PRE_TOKENIZER_NAMES = {False: "gpt-2", True: "smollm"}


GENERATION_MARK = re.compile(r"{%-? (end)?generation -?%}")


def pre_tokenizer_name(described: dict) -> str:
    """llama.cpp's name for the pre-tokenizer in ``described``, the content of tokenizer.json.

    Raises: SettingsError if it has none: llama.cpp would not produce the tokens of training."""
    rule = described["pre_tokenizer"] or {}
    rules = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    *before, last = rules
    is_byte_level = last.get("type") == "ByteLevel" and last.get("use_regex", True)
    digits = [x == SINGLE_DIGITS for x in before]
    is_byte_level &= described["model"]["type"] == "BPE" and described["normalizer"] is None
    if is_byte_level and not last["add_prefix_space"] and digits in ([], [True]):
        return PRE_TOKENIZER_NAMES[bool(digits)]
    raise SettingsError(
        f"--to gguf: llama.cpp has no equivalent of this tokenizer's pre-tokenizer "
        f"({', '.join(x.get('type', 'none') for x in rules)}); expected byte-level BPE, with or "
        f"without single digits"
    )


def tensors(model: MiniMindForCausalLM) -> Iterator[tuple[str, Tensor, list[str]]]:
    """For each tensor of the file: its name in GGUF, its values, and the names of ours in it.

    A projection of all experts is one tensor, (E, out, in)."""
    config = model.config
    arch = gguf.MODEL_ARCH.QWEN3MOE if config.use_moe else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = model.state_dict()
    if config.tie_word_embeddings:  # without a head, llama.cpp takes the embedding
        state.pop("lm_head.weight")
    while state:
        ours = [next(iter(state))]
        stem, experts, rest = ours[0].partition(".experts.")
        name = ours[0]
        if experts:
            projection = rest.split(".")[1]
            ours = [f"{stem}.experts.{i}.{projection}.weight" for i in range(config.num_experts)]
            name = f"{stem}.experts.{projection}.weight"
        weights = [state.pop(key) for key in ours]
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None, name
        yield theirs, torch.stack(weights) if experts else weights[0], ours


def kind_of(name: str, weight: Tensor, gguf_type: str) -> gguf.GGMLQuantizationType:
    """The type in which a tensor is stored: float32 for norms and routers, which are small."""
    if weight.ndim < 2 or "ffn_gate_inp" in name:
        return gguf.GGMLQuantizationType.F32
    if gguf_type == "q8_0" and weight.shape[-1] % BLOCK == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def write_gguf(
    path: Path,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    hf: Path,
    gguf_type: str,
) -> None:
    """Write the file. ``hf``: a folder written by --to hf, for its tokenizer.json.

    Raises: SettingsError if llama.cpp cannot run this model or tokenizer."""
    config = model.config
    if config.use_moe and not config.norm_topk_prob:
        raise SettingsError("--to gguf: llama.cpp always renormalises experts (norm_topk_prob)")
    writer = gguf.GGUFWriter(path, "qwen3moe" if config.use_moe else "qwen3")
    writer.add_name("MiniMind")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    q8_0 = gguf_type == "q8_0"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if q8_0 else gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, tokenizer, hf, config.vocab_size)
    for name, weight, _ in tensors(model):
        kind = kind_of(name, weight, gguf_type)
        writer.add_tensor(name, gguf.quantize(weight.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, hf: Path, vocab_size: int
) -> None:
    """Add vocabulary, merges and special tokens, and let llama.cpp put BOS first."""
    described = json.loads((hf / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token["special"] for token in described["added_tokens"]}
    entries, kinds = [], []
    for i in range(vocab_size):
        if i >= len(tokenizer):
            entry, kind = f"[PAD{i}]", gguf.TokenType.UNUSED
        else:
            entry, kind = tokenizer.convert_ids_to_tokens(i), gguf.TokenType.NORMAL
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i] else gguf.TokenType.USER_DEFINED
        entries.append(entry)
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(described))
    writer.add_token_list(entries)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in described["model"]["merges"]
        ]
    )
    for kind in ("bos", "eos", "pad"):
        if (token_id := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        # The marks tell trainers what the assistant says; other readers of templates lack them.
        writer.add_chat_template(GENERATION_MARK.sub("", str(tokenizer.chat_template)))


def check_gguf(
    path: Path,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Tensor],
) -> str:
    """Read the file back, and compare its tokens, its tensors and a model built from them.

    Args: prompts: each (1, T) int64.
    Returns: a line on the result.
    Raises: CheckpointError if something differs by more than rounding explains."""
    reader = gguf.GGUFReader(path)
    entries = reader.fields["tokenizer.ggml.tokens"].contents()
    for i, entry in enumerate(entries[: len(tokenizer)]):
        if entry != tokenizer.convert_ids_to_tokens(i):
            raise CheckpointError(f"{path}: token {i} was written as {entry!r}")
    read = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name, weight, ours in tensors(model):
        kind = read[name].tensor_type
        values = torch.from_numpy(gguf.dequantize(read[name].data, kind).copy())
        if values.shape != weight.shape:
            raise CheckpointError(f"{path}: {name} was written with shape {tuple(values.shape)}")
        allowed = torch.zeros(())
        if kind == gguf.GGMLQuantizationType.Q8_0:  # half a step of 1/127, and a float16 scale
            blocks = weight.unflatten(-1, (-1, BLOCK))
            allowed = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).flatten(-2) * 0.0045
            allowed = allowed + 4e-6  # the smallest scales are subnormal
        if ((values - weight).abs() > allowed + 1e-7).any():
            raise CheckpointError(f"{path}: {name} was written with other values")
        state |= dict(zip(ours, values if len(ours) > 1 else [values], strict=True))
    if len(read) != (num_tensors := len([*tensors(model)])):
        raise CheckpointError(f"{path}: it has {len(read)} tensors, expected {num_tensors}")
    restored = MiniMindForCausalLM(model.config).eval()
    restored.load_state_dict({"lm_head.weight": state["model.embed_tokens.weight"]} | state)
    num_same, num = 0, 0
    with torch.inference_mode():
        for ids in prompts:
            same = restored(ids).logits.argmax(-1) == model(ids).logits.argmax(-1)  # (1, T)
            num_same += int(same.sum())
            num += ids.shape[1]
    return (
        f"all {len(read)} tensors and {len(entries):,} tokens are correct; the most probable next "
        f"token is the same at {num_same} of {num} positions"
    )
