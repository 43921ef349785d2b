"""Export weights to transformers, llama.cpp and ollama, and import them from transformers.

    python -m scripts.export --to hf --output exported             # a folder for transformers
    python -m scripts.export --to gguf --output pretrain.gguf      # a file for llama.cpp and ollama
    python -m scripts.export --to gguf --gguf_type q8_0 --output pretrain-q8.gguf
    python -m scripts.export --from hf --input tuned --save_weight tuned  # -> out/tuned_768.pth

The folder is an ordinary Qwen3ForCausalLM or Qwen3MoeForCausalLM and contains no code. What was
written is read back and compared with the model before it is moved to --output.
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
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

import eval_llm
from model.generation import MOE_SIZES, SIZES, generating_model
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.command_line import Parser
from trainer.errors import CheckpointError, SettingsError, printable, reason_of
from trainer.program import run_program
from trainer.reading import read_json
from trainer.samples import encode_prompt
from trainer.weights import get_model_params, load_tokenizer, save_weights, weights_path

TOLERANCE = 1e-3  # absolute difference of float32 logits: two implementations round differently
CONFIG_KEYS = {
    *(*SIZES, *MOE_SIZES, "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling"),
    *("attention_bias", "use_sliding_window", "mlp_only_layers", "decoder_sparse_step"),
    "num_local_experts",  # as transformers saves num_experts
}
NOTHING_WRITTEN = (
    f"Nothing was written to --output. transformers {transformers.__version__} is installed; "
    f"requirements.txt has the tested versions."
)

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {kind} with {size}: {layers} layers of width {width}, a vocabulary of {vocabulary:,}.
It {does}. The license above is that of the code; change it if your data asks for another.

```python
from transformers import pipeline

print(pipeline("text-generation", "FOLDER")({prompt}, max_new_tokens=20))
```
"""
RECORDED = {  # key of a run's description: what the card calls it
    "program": "program",
    "from_weight": "began with the weights",
    "max_seq_len": "tokens per row",
    "rows per update": "rows per update",
    "step": "updates",
    "epochs": "epochs",
    "tokens": "tokens with a loss",
    "pairs": "pairs",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "lr_schedule": "its schedule",
    "heldout_loss": "held-out loss",
    "heldout_bits_per_byte": "held-out bits per byte",
    "heldout_accuracy": "held-out accuracy",
}


# ------------------------------------------------------------------------------ to transformers


def add_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make the tokenizer put BOS first, as each document begins with it in training."""
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None:
        bos, bos_id = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
    )
    return tokenizer


def write_hf(folder: Path, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write configuration, weights (float16, as in ours), tokenizer and generation settings."""
    qwen, config = generating_model(model).half(), model.config
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    qwen.generation_config = GenerationConfig(**ids)
    qwen.save_pretrained(folder)
    add_bos(tokenizer).save_pretrained(folder)
    # transformers 4 has other names for these, or looks for them elsewhere.
    older = {"rope_theta": config.rope_theta}
    if config.use_moe:
        older["num_experts"] = config.num_experts
    amend(folder / "config.json", older)
    amend(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # 4 would add token_type_ids
            "padding_side": "left",  # a batch of prompts continues at their ends
        },
        without=("backend", "is_local", "local_files_only"),
    )
    for file in folder.iterdir():  # safetensors makes its files readable by their owner only
        file.chmod((folder / "config.json").stat().st_mode)


def model_card(weights: Path, model: MiniMindForCausalLM, is_chat: bool) -> str:
    """The README.md of the folder, in Markdown with YAML in front, as a hub shows it: the sizes,
    and how the weights were trained as far as the ``.json`` beside them tells."""
    config, prompt = model.config, next(iter(eval_llm.QUESTIONS if is_chat else eval_llm.PROMPTS))
    total, used = get_model_params(model, config)
    card = CARD.format(
        name=weights.stem,
        kind="Qwen3MoeForCausalLM" if config.use_moe else "Qwen3ForCausalLM",
        size=f"{total:,} parameters" + f", {used:,} of them for a token" * (used < total),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        does="answers in conversations" if is_chat else "continues text",
        prompt=json.dumps([{"role": "user", "content": prompt}] if is_chat else prompt),
    )
    try:
        run = read_json(weights.with_suffix(".json"))["run"]
        found = {"program": "pretrain"} | run["settings"] | run
        longest = told(found["max_seq_len"])
    except (OSError, ValueError, LookupError, TypeError):  # MiniMind's own weights, or imported
        return card
    rows = [f"| {RECORDED[key]} | {told(found[key])} |" for key in RECORDED if key in found]
    return (
        card + "\n## Training\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        f"In this training it saw at most {longest} tokens at once. `config.json` allows "
        f"{config.max_position_embeddings:,}; how well it does beyond was not measured.\n"
    )


def told(value: object) -> str:
    """A recorded value, for a cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else f"{printable(value):.80}"


def amend(path: Path, entries: dict, without: tuple[str, ...] = ()) -> None:
    """Set entries of a JSON file, and remove those named in ``without``."""
    described = json.loads(path.read_text(encoding="utf-8")) | entries
    described = {name: value for name, value in described.items() if name not in without}
    path.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_hf(folder: Path, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Load the folder as any user would, and compare. Returns: a line on the result.

    Raises: CheckpointError if tokens, logits or continuations differ; GenerationError if the
    installed transformers computes something else even without an export."""
    qwen = generating_model(model)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own_tokenizer = load_tokenizer(str(folder))
    largest = 0.0
    for prompt in eval_llm.PROMPTS:
        ids = encode_prompt(tokenizer, prompt)
        if own_tokenizer(prompt)["input_ids"] != ids[0].tolist():
            raise CheckpointError(
                f"the exported tokenizer splits {prompt!r} differently from "
                f"{tokenizer.name_or_path}. {NOTHING_WRITTEN}"
            )
        largest = max(largest, difference(model, theirs, ids))
        if largest > TOLERANCE:
            raise CheckpointError(
                f"the logits of the exported weights for {prompt!r} differ by {largest:.2g} "
                f"(expected at most {TOLERANCE}). {NOTHING_WRITTEN}"
            )
        ours, other = (greedy(m, ids) for m in (qwen, theirs))
        if ours != other:
            raise CheckpointError(
                f"with the exported generation settings, {prompt!r} continues as {other}, not as "
                f"{ours}, although the logits agree. {NOTHING_WRITTEN}"
            )
    return (
        f"{len(eval_llm.PROMPTS)} prompts have the same continuations; logits differ by at most "
        f"{largest:.1g}"
    )


@torch.inference_mode()
def difference(ours: MiniMindForCausalLM, theirs: PreTrainedModel, ids: Tensor) -> float:
    """The largest absolute difference of two models' logits for ids (B, T)."""
    return (ours(ids).logits - theirs(ids).logits).abs().max().item()


@torch.inference_mode()
def greedy(
    model: GenerationMixin | MiniMindForCausalLM, ids: Tensor, num_tokens: int = 16
) -> list[int]:
    """The greedy continuation of ids (1, T), without the prompt."""
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


# ---------------------------------------------------------------------------- from transformers


def minimind_config(config: PretrainedConfig) -> MiniMindConfig:
    """The same sizes as a MiniMindConfig. Raises: CheckpointError for unsupported settings."""
    rope = config.rope_parameters or {}
    unsupported = {
        "model_type": config.model_type not in ("qwen3", "qwen3_moe"),
        "attention_bias": getattr(config, "attention_bias", False),
        "use_sliding_window": getattr(config, "use_sliding_window", False),
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "mlp_only_layers": getattr(config, "mlp_only_layers", None),
        "decoder_sparse_step": getattr(config, "decoder_sparse_step", 1) != 1,
    }
    for name, found in unsupported.items():
        if found:
            raise CheckpointError(
                f"{name} is {getattr(config, name)!r}, which MiniMind does not support. Expected a "
                f"Qwen3 or Qwen3-MoE model with the settings that --to hf writes."
            )
    use_moe = config.model_type == "qwen3_moe"
    sizes = {name: getattr(config, name) for name in SIZES + (MOE_SIZES if use_moe else ())}
    if isinstance(sizes["eos_token_id"], list):  # chat models name several
        sizes["eos_token_id"] = sizes["eos_token_id"][0]
    sizes = {name: size for name, size in sizes.items() if size is not None}
    try:
        return MiniMindConfig(
            use_moe=use_moe,
            rope_theta=rope["rope_theta"],
            tie_word_embeddings=config.tie_word_embeddings,
            **sizes,
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"its configuration is not a MiniMind model's: {error}") from None


def minimind_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the experts' ``gate_up_proj`` (E, 2F, D), which joins two of their projections."""
    renamed = {}
    for name, weight in state.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            renamed[stem + "gate_proj"], renamed[stem + "up_proj"] = weight.chunk(2, dim=1)
        else:
            renamed[name] = weight
    return renamed


def read_hf_config(folder: Path) -> PretrainedConfig:
    """The configuration in a folder, of which only what a model like ours has is taken.

    Other entries can make transformers build gigabytes of labels, or look for kernels on a hub.

    Raises: OSError, ValueError; CheckpointError if the weights beside it are too few for it."""
    given = read_json(folder / "config.json")
    kept = {name: given[name] for name in CONFIG_KEYS & given.keys()}
    config = AutoConfig.for_model(str(given.get("model_type")), **kept)
    layer = config.hidden_size * (config.num_attention_heads + config.intermediate_size)
    least = config.vocab_size * config.hidden_size + config.num_hidden_layers * layer
    found = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if least > found:  # a byte each would not do
        raise CheckpointError(f"its sizes take {least:,} numbers, its weights {found:,} bytes")
    return config


def read_hf(folder: Path) -> MiniMindForCausalLM:
    """The model in a folder that transformers can open, compared with it; no code in it is run.

    Raises: CheckpointError if it cannot be opened or is another kind of model."""
    if not folder.is_dir():  # or transformers would look for the name on a hub
        raise CheckpointError(f"--input {folder}: no such folder")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"--input {folder} holds an adapter of PEFT, expected a whole model. Merge it first: "
            f"model.merge_and_unload().save_pretrained(...)"
        )
    try:
        alone = {"trust_remote_code": False, "local_files_only": True}
        found = read_hf_config(folder)
        config = minimind_config(found)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, config=found, dtype=torch.float32, use_safetensors=True, **alone
        ).eval()
        model = MiniMindForCausalLM(config).eval()
        model.load_state_dict(minimind_names(theirs.state_dict()))
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (2, 32), generator=random)
        largest = difference(model, theirs, ids)
    except Exception as error:  # somebody else's folder can raise anything in there
        ours = isinstance(error, CheckpointError)
        reason = printable(str(error).split("\n")[0]) if ours else reason_of(error)
        raise CheckpointError(f"--input {folder}: {reason:.300}") from None
    if not largest <= TOLERANCE:  # nor is it if it is not a number
        raise CheckpointError(f"--input {folder}: logits differ by {largest:.2g}")
    return model


# --------------------------------------------------------------------------------------- program


def build_parser() -> Parser:
    """The parser of all flags; those that select a model are eval_llm.py's."""
    parser = Parser(__doc__)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["hf", "gguf"], help="export in this format")
    way.add_argument("--from", dest="source", choices=["hf"], help="import from this format")
    eval_llm.add_weight_flags(parser)
    parser.add_argument("--output", type=Path, help="with --to: the new folder or file")
    parser.add_argument(
        "--gguf_type",
        choices=["f16", "q8_0"],
        default="f16",
        help="of matrices: two bytes per weight, or about one",
    )
    parser.add_argument("--input", type=Path, help="with --from: the folder to read")
    parser.add_argument("--save_weight", default="imported", help="with --from: name to save under")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises: SettingsError if a path is missing or would be overwritten."""
    if args.to and args.output is None:
        raise SettingsError("--output is missing: the folder or file to write")
    if args.source and args.input is None:
        raise SettingsError("--input is missing: the folder to read")
    if args.to and args.output.exists():
        raise SettingsError(f"--output {args.output} exists; choose another, or remove it")


def export(args: argparse.Namespace) -> None:
    """Write to a temporary place beside --output, compare, and only then move it there."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = eval_llm.load_model(args, tokenizer).float()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".export-") as folder:
        hf = Path(folder) / "hf"
        write_hf(hf, model, load_tokenizer(args.tokenizer_path))
        if args.to == "hf":
            made, found = hf, check_hf(hf, model, tokenizer)
            card = model_card(eval_llm.find_weights(args), model, eval_llm.is_chat(args))
            (hf / "README.md").write_text(card, encoding="utf-8")
        else:
            from scripts.export_gguf import check_gguf, write_gguf

            made = Path(folder) / "model.gguf"
            if not eval_llm.is_chat(args):
                tokenizer.chat_template = None  # a server would talk with a model that cannot
            write_gguf(made, model, tokenizer, hf, args.gguf_type)
            found = check_gguf(made, model, tokenizer, prompt_ids(tokenizer))
        shutil.move(made, args.output)
    print(f"{args.output}: {found}")


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> Iterable[Tensor]:
    """The prompts of the comparison, each (1, T) int64."""
    return [encode_prompt(tokenizer, prompt) for prompt in eval_llm.PROMPTS]


def import_weights(args: argparse.Namespace) -> None:
    """Read a folder of transformers, and write a ``.pth`` file."""
    model = read_hf(args.input)
    path = weights_path(args.save_dir, args.save_weight, model.config)
    if path.exists():
        raise SettingsError(f"{path} exists; choose another --save_weight, or remove it")
    half_max = torch.finfo(torch.float16).max
    for name, weight in model.state_dict().items():
        if not weight.abs().max() <= half_max:  # also if it is NaN
            raise CheckpointError(f"--input {args.input}: {name} exceeds the range of float16")
    save_weights(path, model, {"from": str(args.input)})
    has_tokenizer = (args.input / "tokenizer.json").exists()
    print(
        f"{path}: logits agree. Try it: python eval_llm.py --weight {args.save_weight} "
        f"--save_dir {args.save_dir} --hidden_size {model.config.hidden_size}"
        + (f" --tokenizer_path {args.input}" if has_tokenizer else "")
    )


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, else see trainer/errors.py."""

    def program() -> None:
        disable_progress_bar()  # of transformers: the files are small
        args = build_parser().parse_args(argv)
        check_flags(args)
        import_weights(args) if args.source else export(args)

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
