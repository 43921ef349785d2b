"""Our weights for other tools, and theirs for ours.

    python -m scripts.export --to hf --output exported             # a folder for transformers
    python -m scripts.export --to gguf --output pretrain.gguf      # a file for llama.cpp and ollama
    python -m scripts.export --to gguf --gguf_type q8_0 --output pretrain-q8.gguf
    python -m scripts.export --from hf --input tuned --save_weight tuned  # -> out/tuned_768.pth

The folder is an ordinary Qwen3ForCausalLM or Qwen3MoeForCausalLM, without code of ours. What was
written is opened again and compared with the model before it gets its name.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel,
    PretrainedConfig, PreTrainedTokenizerBase
)
from transformers.utils.logging import disable_progress_bar

import eval_llm
from model.generation import MOE_SIZES, SIZES, generating_model
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.errors import CheckpointError, SettingsError
from trainer.evaluation import encode_prompt
from trainer.flags import Parser
from trainer.program import run_program
from trainer.weights import load_tokenizer, save_weights, weights_path

CLOSE = 1e-3  # of logits in float32, which two programs add up in another order
NOTHING_WRITTEN = (
    f"Nothing was left under --output. transformers is {transformers.__version__}; tried are those "
    f"of requirements.txt."
)


# ------------------------------------------------------------------------------ to transformers


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """It puts BOS first by itself, as every document begins in training."""
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None:
        bos, bos_id = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
    )
    return tokenizer


def write_hf(folder: Path, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Configuration, weights (float16, as in our file), tokenizer and settings of generation."""
    qwen, config = generating_model(model).half(), model.config
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    qwen.generation_config = GenerationConfig(**ids)
    qwen.save_pretrained(folder)
    begins_with_bos(tokenizer).save_pretrained(folder)
    # What transformers 4 calls by another name, or looks for elsewhere.
    older = {"rope_theta": config.rope_theta}
    if config.use_moe:
        older["num_experts"] = config.num_experts
    amend(folder / "config.json", older)
    amend(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # 4 would add token_type_ids
        "padding_side": "left",  # a batch of prompts continues at their ends
    }, without=("backend", "is_local", "local_files_only"))
    for file in folder.iterdir():  # safetensors' are private: no other user's server reads them
        file.chmod((folder / "config.json").stat().st_mode)


def amend(path: Path, entries: dict, without: tuple[str, ...] = ()) -> None:
    """Change a JSON file."""
    described = json.loads(path.read_text(encoding="utf-8")) | entries
    described = {name: value for name, value in described.items() if name not in without}
    path.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_hf(folder: Path, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Open it as anybody would, and compare. Returns: what was found, for a line.

    Raises: CheckpointError if logits or a continuation differ, GenerationError if it is not the
    export's fault."""
    qwen = generating_model(model)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own_tokenizer = load_tokenizer(str(folder))
    furthest = 0.0
    for prompt in eval_llm.PROMPTS:
        ids = encode_prompt(tokenizer, prompt)
        if own_tokenizer(prompt)["input_ids"] != ids[0].tolist():
            raise CheckpointError(f"the tokenizer that was written reads {prompt!r} otherwise than "
                                  f"{tokenizer.name_or_path}. {NOTHING_WRITTEN}")
        furthest = max(furthest, difference(model, theirs, ids))
        if furthest > CLOSE:
            raise CheckpointError(f"the weights that were written give {prompt!r} logits that "
                                  f"differ by {furthest:.2g} (expected {CLOSE} at most). "
                                  f"{NOTHING_WRITTEN}")
        ours, other = (greedy(m, ids) for m in (qwen, theirs))
        if ours != other:
            raise CheckpointError(f"the settings of generation that were written continue "
                                  f"{prompt!r} as {other} instead of {ours}, though logits are "
                                  f"alike. {NOTHING_WRITTEN}")
    return (f"{len(eval_llm.PROMPTS)} prompts continue alike; logits differ by {furthest:.1g} at "
            f"most")


@torch.inference_mode()
def difference(ours: MiniMindForCausalLM, theirs: PreTrainedModel, ids: Tensor) -> float:
    """The largest between two models' logits."""
    return (ours(ids).logits - theirs(ids).logits).abs().max().item()


@torch.inference_mode()
def greedy(
    model: GenerationMixin | MiniMindForCausalLM, ids: Tensor, num_tokens: int = 16
) -> list[int]:
    """Always the likeliest token."""
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


# ---------------------------------------------------------------------------- from transformers


def minimind_config(config: PretrainedConfig) -> MiniMindConfig:
    """A Qwen3 configuration in our words. Raises: CheckpointError for what we do not have."""
    rope = config.rope_parameters or {}
    unknown = {
        "model_type": config.model_type not in ("qwen3", "qwen3_moe"),
        "attention_bias": getattr(config, "attention_bias", False),
        "use_sliding_window": getattr(config, "use_sliding_window", False),
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "mlp_only_layers": getattr(config, "mlp_only_layers", None),
        "decoder_sparse_step": getattr(config, "decoder_sparse_step", 1) != 1,
    }
    for name, found in unknown.items():
        if found:
            raise CheckpointError(
                f"{name} is {getattr(config, name)!r}: no MiniMind model. Expected a Qwen3 or "
                f"Qwen3-MoE of the kind that --to hf writes."
            )
    use_moe = config.model_type == "qwen3_moe"
    sizes = {name: getattr(config, name) for name in SIZES + (MOE_SIZES if use_moe else ())}
    if isinstance(sizes["eos_token_id"], list):  # chat models name several
        sizes["eos_token_id"] = sizes["eos_token_id"][0]
    sizes = {name: size for name, size in sizes.items() if size is not None}
    try:
        return MiniMindConfig(use_moe=use_moe, rope_theta=rope["rope_theta"], **sizes)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"it describes no MiniMind model: {error}") from None


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps two of an expert's three matrices in one."""
    renamed = {}
    for name, weight in state.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            renamed[stem + "gate_proj"], renamed[stem + "up_proj"] = weight.chunk(2, dim=1)
        else:
            renamed[name] = weight
    return renamed


def read_hf(folder: Path) -> MiniMindForCausalLM:
    """A folder that transformers opens, as our model, compared with theirs; no code of it runs.

    Raises: CheckpointError if it is none, or of another kind."""
    if not folder.is_dir():  # a name might be looked for on a hub
        raise CheckpointError(f"--input {folder}: no such folder")
    try:
        config = minimind_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"--input {folder}: {reason:.300}") from None
    state = theirs.state_dict()
    if not state["lm_head.weight"].equal(state["model.embed_tokens.weight"]):
        raise CheckpointError(f"--input {folder}: its head is not its embedding (expected tied)")
    model = MiniMindForCausalLM(config).eval()
    model.load_state_dict(our_names(state))
    ids = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    if (furthest := difference(model, theirs, ids)) > CLOSE:
        raise CheckpointError(f"--input {folder}: our logits differ by {furthest:.2g}")
    return model


# --------------------------------------------------------------------------------------- program


def build_parser() -> Parser:
    """Flags; those of the weights as in eval_llm.py."""
    parser = Parser(__doc__)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["hf", "gguf"], help="what to write")
    way.add_argument("--from", dest="source", choices=["hf"], help="what to read")
    eval_llm.add_weight_flags(parser)
    parser.add_argument("--output", type=Path, help="with --to: a new folder, or file")
    parser.add_argument("--gguf_type", choices=["f16", "q8_0"], default="f16",
                        help="of matrices: two bytes a weight, or one")
    parser.add_argument("--input", type=Path, help="with --from: the folder")
    parser.add_argument("--save_weight", default="imported", help="with --from: the new name")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises: SettingsError."""
    needed = "--output" if args.to else "--input"
    if getattr(args, needed[2:]) is None:
        raise SettingsError(f"{needed} is missing: where to?" if args.to else
                            f"{needed} is missing: the folder to read")
    if args.to and args.output.exists():
        raise SettingsError(f"--output {args.output} exists; name a new one, or remove it")


def export(args: argparse.Namespace) -> None:
    """Write it beside its place, compare, and only then give it its name."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = eval_llm.load_model(args, tokenizer).float()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".export-") as folder:
        hf = Path(folder) / "hf"
        write_hf(hf, model, load_tokenizer(args.tokenizer_path))
        if args.to == "hf":
            made, found = hf, check_hf(hf, model, tokenizer)
        else:
            from scripts.export_gguf import check_gguf, write_gguf

            made = Path(folder) / "model.gguf"
            write_gguf(made, model, tokenizer, hf, args.gguf_type)
            found = check_gguf(made, model, tokenizer, prompt_ids(tokenizer))
        shutil.move(made, args.output)
    print(f"{args.output}: {found}")


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> Iterable[Tensor]:
    """Prompts to compare with."""
    return [encode_prompt(tokenizer, prompt) for prompt in eval_llm.PROMPTS]


def bring_back(args: argparse.Namespace) -> None:
    """From a folder to our file."""
    model = read_hf(args.input)
    path = weights_path(args.save_dir, args.save_weight, model.config)
    if path.exists():
        raise SettingsError(f"{path} exists; choose another --save_weight, or remove it")
    half_max = torch.finfo(torch.float16).max
    for name, weight in model.state_dict().items():
        if not weight.abs().max() <= half_max:
            raise CheckpointError(f"--input {args.input}: {name} does not fit float16")
    save_weights(path, model, {"from": str(args.input)})
    tokens = "with its tokenizer: " if (args.input / "tokenizer.json").exists() else ""
    print(f"{path}: logits are alike. Go on {tokens}python eval_llm.py --weight {args.save_weight} "
          f"--save_dir {args.save_dir} --hidden_size {model.config.hidden_size}"
          + (f" --tokenizer_path {args.input}" if tokens else ""))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 flags, 4 weights."""

    def program() -> None:
        disable_progress_bar()  # transformers': they are of no use for so small files
        args = build_parser().parse_args(argv)
        check_flags(args)
        bring_back(args) if args.source else export(args)

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
