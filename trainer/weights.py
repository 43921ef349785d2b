"""Weights in MiniMind's format, a half-precision ``.pth`` with a ``.json`` beside it; and the model
and tokenizer that they belong to."""

import contextlib
import inspect
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.checkpoint import checkpoint_name, write_atomically
from trainer.errors import (
    BadUpdateError,
    CheckpointError,
    Interrupted,
    SettingsError,
    printable,
    reason_of,
)
from trainer.reading import read_json
from trainer.untrusted import load_tensors

# Fields of the configuration that also follow from the shapes of the weights.
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "use_moe", "head_dim"),
    *("num_attention_heads", "num_key_value_heads"),
)
EXPERTS = ("moe_intermediate_size", "num_experts")  # the same, with experts
MAX_POSITIONS = 2**24


def weights_path(save_dir: str | Path, weight: str, config: MiniMindConfig) -> Path:
    """``out/pretrain_768.pth``, ``out/pretrain_768_moe.pth``."""
    return Path(save_dir) / f"{checkpoint_name(weight, config)}.pth"


def save_weights(path: Path, model: MiniMindForCausalLM, summary: dict) -> None:
    """Write the weights, and their configuration with a ``summary`` of the run.

    Raises: OSError; BadUpdateError, with nothing written, if one is too large for the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tied, state = model.config.tie_word_embeddings, model.state_dict()
    if tied:
        state.pop("lm_head.weight")
    half = {key: value.half().cpu() for key, value in state.items()}
    bad = next((key for key, value in half.items() if not value.isfinite().all()), None)
    if bad:
        raise BadUpdateError(
            f"{path}: {bad} is not finite in half precision, whose largest number is 65504. Start "
            f"again with a lower --learning_rate."
        )
    if tied:
        # MiniMind's files name the tied matrix twice. Sharing storage, it is stored only once.
        half["lm_head.weight"] = half["model.embed_tokens.weight"]
    write_atomically(path, partial(torch.save, half))
    description = {"config": model.config.to_diff_dict(), "run": summary}
    text = json.dumps(description, indent=1, ensure_ascii=False)
    write_atomically(path.with_suffix(".json"), text.encode())  # last, so that it implies weights


def describes(path: Path, summary: dict) -> bool:
    """Whether the weights at ``path`` were saved with this summary."""
    with contextlib.suppress(OSError, ValueError):
        return path.exists() and read_json(path.with_suffix(".json")).get("run") == summary
    return False


def existing(path: Path) -> Path:
    """The path of a ``.pth`` file. Raises: CheckpointError if there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Train it first, or choose other weights.")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file, without running code from it. Raises: CheckpointError."""
    state = load_tensors(existing(path))
    if "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return state


def load_weights(model: MiniMindForCausalLM, path: Path, flag: str) -> None:
    """Load a file's weights into the model. If any does not fit, none is loaded.

    Raises: CheckpointError naming ``flag`` and the first differences."""
    given, own = read_weights(path), model.state_dict()
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own]
    reshaped = [key for key in own if key in given and own[key].shape != given[key].shape]
    endless = [key for key, value in given.items() if not value.isfinite().all()]
    differences = [
        *(f"{key} is {tuple(given[key].shape)}, not {tuple(own[key].shape)}" for key in reshaped),
        *(f"{key} is missing" for key in missing),
        *(f"{key} is not in this model" for key in unexpected),
        *(f"{key} holds numbers that are not finite" for key in endless),
    ]
    if model.config.tie_word_embeddings and not is_tied(given):
        differences.append("lm_head.weight is not model.embed_tokens.weight, to which it is tied")
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{flag}: {path} does not fit this model: {'; '.join(differences[:5])}{more}. "
            f"{fitting_flags(path, given)}"
        )
    model.load_state_dict(given)


def is_tied(state: dict[str, Tensor]) -> bool:
    """Whether the weights' output head is their embedding."""
    embedding = state.get("model.embed_tokens.weight")
    head = state.get("lm_head.weight", embedding)
    return embedding is None or head is embedding or (head is not None and head.equal(embedding))


def fitting_flags(path: Path, state: dict[str, Tensor]) -> str:
    """A sentence with the flags that fit a weights file, for an error message."""
    try:
        config = read_config(path, state)
    except CheckpointError:
        return "Choose other weights."
    return (
        f"It fits --hidden_size {config.hidden_size} "
        f"--num_hidden_layers {config.num_hidden_layers} "
        f"--num_attention_heads {config.num_attention_heads} "
        f"--num_key_value_heads {config.num_key_value_heads} "
        f"--intermediate_size {config.intermediate_size} --use_moe {int(config.use_moe)} "
        + "--tie_word_embeddings 0 " * (not config.tie_word_embeddings)
        + f"and a tokenizer of {config.vocab_size} entries."
    )


def read_config(path: Path, state: dict[str, Tensor]) -> MiniMindConfig:
    """The architecture of a weights file: from the ``.json`` beside it, else from the shapes.

    Raises: CheckpointError if the two disagree, or do not describe a model."""
    description = path.with_suffix(".json")
    if description.is_file():
        try:
            described = read_json(description)["config"]
            # Other names would become attributes, and could hide a method.
            known = inspect.signature(MiniMindConfig).parameters
            given = {k: described[k] for k in known.keys() & described.keys() - {"kwargs"}}
            for name, value in given.items():
                kind = known[name].annotation
                if not isinstance(value, kind | int if kind is float else kind):
                    raise ValueError(f"{name} is {value!r:.40}")
            config = MiniMindConfig(**given)
            if not 0 < config.max_position_embeddings <= MAX_POSITIONS:
                raise ValueError(f"{config.max_position_embeddings!s:.40} positions")
            if not 0 < config.num_experts_per_tok <= config.num_experts:
                raise ValueError(f"{config.num_experts_per_tok!s:.40} experts a token")
        except Exception as error:  # transformers checks some of it, by exceptions of its own
            reason = printable(reason_of(error))
            raise CheckpointError(f"{description} does not describe a model: {reason}") from None
        if not state:
            return config
        sizes = config_from_shapes(state, path)
        inner = EXPERTS if sizes.use_moe else ("intermediate_size",)
        for name in SIZES + inner:  # before a model of that size is built
            if getattr(config, name) != getattr(sizes, name):
                raise CheckpointError(
                    f"{description} says {name} {printable(getattr(config, name)):.40}, but the "
                    f"weights beside it have {getattr(sizes, name)}."
                )
        try:
            with torch.device("meta"):  # an unknown activation, a dropout of -1 or the like
                MiniMindForCausalLM(config)
        except Exception as error:
            reason = printable(reason_of(error))
            raise CheckpointError(f"{description} does not describe a model: {reason}") from None
        return config
    return config_from_shapes(state, path)


def config_from_shapes(state: dict[str, Tensor], path: Path) -> MiniMindConfig:
    """The architecture of a file without a ``.json``, such as MiniMind's own. The shapes determine
    all sizes except the number of experts per token.

    Raises: CheckpointError if the names are not MiniMind's."""
    layer = "model.layers.0."
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        head_dim = len(state[layer + "self_attn.q_norm.weight"])
        use_moe = layer + "mlp.gate.weight" in state
        expert = "experts.0." if use_moe else ""
        return MiniMindConfig(
            hidden_size=hidden_size,
            num_hidden_layers=len({key.split(".")[2] for key in state if ".layers." in key}),
            use_moe=use_moe,
            vocab_size=vocab_size,
            head_dim=head_dim,
            num_attention_heads=len(state[layer + "self_attn.q_proj.weight"]) // head_dim,
            num_key_value_heads=len(state[layer + "self_attn.k_proj.weight"]) // head_dim,
            intermediate_size=len(state[f"{layer}mlp.{expert}gate_proj.weight"]),
            num_experts=len(state[layer + "mlp.gate.weight"]) if use_moe else 4,
            tie_word_embeddings=is_tied(state),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}: these are not MiniMind weights.") from None
    except (ValueError, TypeError, ZeroDivisionError) as error:  # shapes that do not fit together
        raise CheckpointError(f"{path} holds no MiniMind weights: {error}.") from None


def init_model(
    lm_config: MiniMindConfig,
    from_weight: str = "none",
    tokenizer_path: str = "model",
    save_dir: str = "out",
    device: str | torch.device = "cpu",
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """A model, new or with the weights ``<save_dir>/<from_weight>_*.pth``, and its tokenizer.

    Raises: CheckpointError if the weights are missing or do not fit; SettingsError."""
    tokenizer = load_tokenizer(tokenizer_path)
    model = MiniMindForCausalLM(lm_config)
    if from_weight != "none":
        path = weights_path(save_dir, from_weight, lm_config)
        load_weights(model, path, flag=f"--from_weight {from_weight}")
    return model.to(device), tokenizer


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Any transformers tokenizer in a folder, without running code from it or asking a hub.
    ``model`` is the bundled one, whatever the working directory.

    Raises: SettingsError if ``path`` does not hold a tokenizer, or one that cannot be used."""
    if path == "model" and not Path(path).is_dir():
        path = str(Path(__file__).resolve().parents[1] / path)
    if not Path(path).is_dir():  # or transformers would look for the name on a hub
        raise SettingsError(
            f"--tokenizer_path {path} holds no tokenizer: no such folder. For one from a hub, "
            f"download it first: hf download OWNER/NAME --local-dir FOLDER"
        )
    for file in Path(path).iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():  # a pipe would never end
            raise SettingsError(
                f"--tokenizer_path {path} cannot be used: {file.name} is not a regular file."
            )
    try:
        # pyrefly: ignore[bad-assignment]  # the inferred type includes None, never returned
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except (Interrupted, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged file can cause anything, also a panic of Rust
        raise SettingsError(
            f"--tokenizer_path {path} holds no tokenizer: {reason_of(error):.200}"
        ) from None
    if problem := problem_of(tokenizer):
        raise SettingsError(f"--tokenizer_path {path} cannot be used: {problem}.")
    return tokenizer


def problem_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why training would end, or not be repeatable, with this tokenizer; None if it would not.

    To be asked first: written out, a vocabulary with an id of billions takes all memory."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= len(tokenizer):
        return f"its largest id is {largest:,}, but it has {len(tokenizer):,} entries"
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        return f"its dropout is {dropout:g}, so that a text's ids change each time; set it to null"
    return None


def get_model_params(model: MiniMindForCausalLM, config: MiniMindConfig) -> tuple[int, int]:
    """The number of all parameters, and of those that one token uses (fewer with experts)."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unused = experts * (1 - config.num_experts_per_tok / config.num_experts)
    return total, total - round(unused)
