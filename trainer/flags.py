"""The flags of train_pretrain.py, each declared once with default, help, bounds, meaning on resume.

The command line and its checks (command_line.py) and the comparison with a saved run
(saved_settings.py) follow from the dataclasses below. Flags have MiniMind's names where it has
them; intervals count optimizer updates.
"""

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from trainer.device import default_device
from trainer.optimizer import OPTIMIZERS, Tuning
from trainer.schedule import SCHEDULES

# What a flag means on resume. DECIDES: it determines what is learned, so it must stay the same.
# SPLITS: it determines how the work is divided, so a change affects only rounding. FREE: neither.
DECIDES, SPLITS, FREE = "decides", "splits", "free"
AUTO = -1  # given as the word "auto": a number that the run chooses
LARGEST = 10**18  # of any number: a state holds it as int64, and a run computes with it
MOST_ROWS = 10**6  # of a micro-step, and micro-steps: their product is a number of rows


def flag(
    default: Any,
    help: str,
    *,
    resume: str = FREE,
    older: Any = None,
    alias: str | None = None,
    auto: bool = False,
    choices: typing.Iterable | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that becomes a flag.

    Args:
        default: the value, or a function that returns it.
        resume: DECIDES, SPLITS or FREE.
        older: the value in effect in states that were saved before the flag existed.
        alias: a second name.
        auto: whether the word "auto" may stand for the number.
        least, most: inclusive bounds.
        above, below: exclusive bounds. A number without bounds is above -LARGEST, below LARGEST;
            infinity is one that ``most=math.inf`` admits."""
    metadata = {
        "help": help,
        "resume": resume,
        "older": older,
        "alias": alias,
        "auto": auto,
        "choices": choices,
        "least": least,
        "above": above,
        "most": most,
        "below": below,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_corpus() -> list[str]:
    """MiniMind's small pretraining corpus."""
    return ["dataset/pretrain_t2t_mini.jsonl"]


# Defaults that explicit flags override.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "data_path": ["dataset/pretrain_sample.jsonl"],
        "heldout_fraction": 0.02,
        "max_seq_len": 128,
        "batch_size": 8,
        "accumulation_steps": 1,
        "optimizer": "muon",
        "learning_rate": 5e-3,
        "lr_schedule": "wsd",
        "warmup_ratio": 0.05,
        "decay_ratio": 0.9,
        "epochs": 4,
        "log_interval": 50,
        "eval_interval": 500,
        "save_interval": 500,
    },
    "26m": {"hidden_size": 512, "num_key_value_heads": 2, "intermediate_size": 1408},
    "64m": {},
    "104m": {"num_hidden_layers": 16, "num_key_value_heads": 2, "intermediate_size": 2048},
    "moe": {"use_moe": 1},
}

# What learns most from the same tokens, see docs/RECIPES.md. Explicit flags override these, too.
RECIPES: dict[str, dict[str, Any]] = {
    "minimind": {},
    "best": {
        "tie_word_embeddings": 0,
        "embedding_init": "bigrams",
        "look_back_heads": AUTO,
        "batch_size": AUTO,
        "accumulation_steps": 1,
        "optimizer": "muon",
        "learning_rate": AUTO,
        "embedding_lr_scale": 12.0,
        "head_lr_scale": 4.0,
        "vector_lr_scale": 4.0,
        "adam_beta1": 0.6,
        "adam_beta2": 0.98,
        "muon_momentum": 0.9,
        "muon_beta2": 0.95,
        "muon_period": 2,
        "lr_schedule": "wsd",
        "warmup_ratio": 0.05,
        "decay_ratio": 0.85,
    },
}


class Program(NamedTuple):
    """A kind of training, by what it changes of the defaults. Explicit flags override all."""

    name: str = "pretrain"  # also of its weights
    defaults: Mapping[str, Any] = MappingProxyType({})
    presets: Mapping[str, dict[str, Any]] = MappingProxyType({})  # over the preset and the defaults
    flags: type | None = None  # a dataclass of flags of its own, beside those of TrainConfig
    documents: str = "documents"
    unit: str = "tokens"  # what has a loss, and is counted
    per_row: int = 1  # how many times --max_seq_len fit into a row

    @property
    def is_chat(self) -> bool:
        """Whether its models answer, instead of continuing text."""
        return self.name != "pretrain"


PRETRAIN = Program()


@dataclass
class ModelFlags:
    """model"""

    preset: str = flag("64m", "set of defaults for sizes and data; see README", choices=PRESETS)
    hidden_size: int = flag(768, "width of the model", resume=DECIDES, least=1, most=65536)
    num_hidden_layers: int = flag(8, "number of layers", resume=DECIDES, least=1, most=4096)
    num_attention_heads: int = flag(8, "number of query heads", resume=DECIDES, least=1, most=4096)
    num_key_value_heads: int = flag(
        4, "number of key/value heads", resume=DECIDES, least=1, most=4096
    )
    intermediate_size: int | None = flag(
        None, "feed-forward width; None: hidden_size * pi", resume=DECIDES, least=1, most=262144
    )
    dropout: float = flag(
        0.0, "probability of dropping an activation in training", resume=DECIDES, least=0, below=1
    )
    use_moe: int = flag(0, "1: mixture of experts", resume=DECIDES, choices=[0, 1])
    tie_word_embeddings: int = flag(
        1,
        "0: an output head of its own, instead of the embedding",
        resume=DECIDES,
        older=1,
        choices=[0, 1],
    )
    embedding_init: str = flag(
        "random",
        "bigrams: embedding and output head begin with what counts of neighbouring tokens tell; "
        "needs --tie_word_embeddings 0",
        resume=DECIDES,
        older="random",
        choices=["random", "bigrams"],
    )
    look_back_heads: int = flag(
        0,
        "heads of the first layer that begin by attending to the tokens one to three before; auto: "
        "half of them; needs --embedding_init bigrams",
        resume=DECIDES,
        older=0,
        auto=True,
        least=0,
    )
    tokenizer_path: str = flag("model", "folder of a transformers tokenizer")
    from_weight: str = flag(
        "none", "start from the weights of this name in --save_dir", resume=DECIDES
    )


@dataclass
class DataFlags:
    """data"""

    data_path: list[str] = flag(  # noqa: RUF009
        default_corpus,
        "files, folders or glob patterns: .jsonl and .txt, also as .gz or .zst, and .parquet",
    )
    text_column: str = flag("text", "JSONL key or parquet column of the text")
    max_seq_len: int = flag(
        512, "tokens in a row", alias="max_length", resume=DECIDES, least=2, most=32768
    )
    packing: int = flag(1, "0: one padded document per row", resume=DECIDES, choices=[0, 1])
    heldout_fraction: float = flag(
        0.005, "fraction of documents held out from training", resume=DECIDES, least=0, below=1
    )
    num_workers: int = flag(
        0, "data loading processes; 0 suffices except on slow disks", least=0, most=1024
    )
    bad_records: str = flag(
        "stop", "on a record that cannot be read: stop, or skip it", choices=["stop", "skip"]
    )
    cache_dir: str = flag("dataset/cache", "folder for tokenized data")


@dataclass
class TrainingFlags:
    """training"""

    recipe: str = flag(
        "minimind",
        "best: another set of defaults, which learns more from the same tokens",
        choices=RECIPES,
    )
    epochs: int = flag(1, "passes over the data", resume=DECIDES, least=1)
    batch_size: int = flag(
        32,
        "rows per micro-step on each device; an update takes batch_size x accumulation_steps x "
        "devices; auto: as suits the length of the run",
        resume=SPLITS,
        auto=True,
        least=1,
        most=MOST_ROWS,
    )
    accumulation_steps: int = flag(
        8,
        "micro-steps per update, whose gradients are added up",
        resume=SPLITS,
        least=1,
        most=MOST_ROWS,
    )
    optimizer: str = flag(
        "adamw",
        "muon: Muon for the layers' matrices, AdamW for the rest",
        resume=DECIDES,
        older="adamw",
        choices=list(OPTIMIZERS),
    )
    learning_rate: float = flag(
        5e-4,
        "peak learning rate; auto: as suits the sizes of model, update and run",
        alias="lr",
        resume=DECIDES,
        auto=True,
        above=0,
        below=1e3,
    )
    embedding_lr_scale: float = flag(
        1.0,
        "learning rate of the embedding, over that of the layers' matrices",
        resume=DECIDES,
        older=1.0,
        least=1e-6,
        most=1e6,
    )
    head_lr_scale: float = flag(
        1.0,
        "likewise, of an output head with --tie_word_embeddings 0",
        resume=DECIDES,
        older=1.0,
        least=1e-6,
        most=1e6,
    )
    vector_lr_scale: float = flag(
        1.0, "likewise, of the norms' weights", resume=DECIDES, older=1.0, least=1e-6, most=1e6
    )
    adam_beta1: float = flag(
        0.9, "decay of AdamW's first moment", resume=DECIDES, older=0.9, least=0, below=1
    )
    adam_beta2: float = flag(
        0.95, "decay of AdamW's second moment", resume=DECIDES, older=0.95, least=0, below=1
    )
    muon_momentum: float = flag(
        0.95, "decay of Muon's moment", resume=DECIDES, older=0.95, least=0, below=1
    )
    muon_beta2: float = flag(
        0.0,
        "decay of the second moment of each row of Muon's updates (NorMuon); 0: without",
        resume=DECIDES,
        older=0.0,
        least=0,
        below=1,
    )
    muon_period: int = flag(
        1,
        "each matrix moves in every so many updates of Muon, and so many times as far",
        resume=DECIDES,
        older=1,
        least=1,
        most=100,
    )
    weight_decay: float = flag(
        0.1,
        "times the learning rate: the share of a weight that an update takes away; not of norms",
        resume=DECIDES,
        older=0.1,
        least=0,
        most=100,
    )
    lr_schedule: str = flag(
        "cosine",
        "cosine: decay to a tenth; wsd: constant, then decay to zero",
        resume=DECIDES,
        older="cosine",
        choices=SCHEDULES,
    )
    warmup_ratio: float = flag(
        0.0, "fraction of the run for the warm-up", resume=DECIDES, older=0.0, least=0, below=1
    )
    decay_ratio: float = flag(
        0.4, "fraction of the run for the decay of wsd", resume=DECIDES, older=0.4, above=0, most=1
    )
    max_minutes: float | None = flag(
        None,
        "plan the run to end after this time, summed over all starts; the data is repeated as "
        "often as fits, and --epochs is ignored",
        above=0,
        below=1e6,
    )
    grad_clip: float = flag(
        1.0, "largest gradient norm; inf: no clipping", resume=DECIDES, above=0, most=math.inf
    )
    max_bad_updates: int = flag(
        20, "tolerated consecutive updates with a non-finite loss or gradient", least=0
    )
    seed: int = flag(42, "seed of initial weights and data order", resume=DECIDES)


@dataclass
class MachineFlags:
    """machine"""

    device: str = flag(default_device, "cuda, mps or cpu", resume=SPLITS)
    dtype: str | None = flag(
        None,
        "of matrix products; None: bfloat16 if native, else float16 on a GPU, float32 on a CPU",
        resume=DECIDES,
        choices=["bfloat16", "float16", "float32"],
    )
    residual_dtype: str | None = flag(
        None,
        "of the stream between layers; None: bfloat16 on cuda with --dtype bfloat16, else float32",
        resume=DECIDES,
        older="float32",
        choices=["float32", "bfloat16"],
    )
    use_compile: int | None = flag(
        None, "1: compile the model; None: only on cuda", resume=SPLITS, choices=[0, 1]
    )
    micro_batch_size: int | None = flag(
        None,
        "rows per forward and backward pass; does not change the updates; None: batch_size, or "
        "on cuda as many as are useful and fit",
        resume=SPLITS,
        least=1,
        most=MOST_ROWS,
    )
    strict_fast_path: int = flag(
        0,
        "1: end with an error if a kernel, the compiler or the like fails, instead of training "
        "without it",
        choices=[0, 1],
    )
    timeout: int = flag(
        600,
        "seconds after which an unresponsive rank or loader process counts as lost",
        least=1,
        most=10**6,
    )


@dataclass
class FileFlags:
    """files"""

    save_dir: str = flag("out", "folder for weights and metrics")
    save_weight: str = flag("pretrain", "prefix of all file names")
    checkpoint_dir: str = flag("checkpoints", "folder for states to resume from")
    checkpoint_mirror: str | None = flag(
        None, "folder or URL that receives a copy of each state; see README"
    )
    save_interval: int = flag(1000, "updates between saves", least=1)
    keep_states: int = flag(2, "number of newest states to keep", least=1)
    from_resume: int = flag(0, "1: resume if there is a state", choices=[0, 1])
    resume_step: int | None = flag(None, "return to the state of this update", least=0)
    skip_steps: str | None = flag(
        None, "FIRST:END, updates to skip, excluding END; to get past a loss spike"
    )
    anneal_from: str | None = flag(
        None, "path of a state from the stable phase of a wsd run; start its decay there"
    )
    overwrite: int = flag(0, "1: delete the files of an earlier run", choices=[0, 1])


@dataclass
class WatchingFlags:
    """watching"""

    log_interval: int = flag(10, "updates between log lines", least=1)
    eval_interval: int = flag(250, "updates between held-out evaluations", least=1)
    eval_tokens: int = flag(2**18, "held-out tokens per evaluation, at most", least=1)
    price_per_hour: float | None = flag(
        None, "of the machine; makes the run report its cost", least=0, below=1e9
    )
    dry_run: int = flag(
        0,
        "1: estimate memory, time and cost from a few updates, without saving anything",
        choices=[0, 1],
    )
    use_wandb: bool = flag(False, "log to SwanLab: to the cloud if logged in, else locally")
    wandb_project: str = flag("MiniMind-Pretrain", "SwanLab project")


GROUPS = (ModelFlags, DataFlags, TrainingFlags, MachineFlags, FileFlags, WatchingFlags)


@dataclass
class TrainConfig(WatchingFlags, FileFlags, MachineFlags, TrainingFlags, DataFlags, ModelFlags):
    """All flags."""

    program: Program = PRETRAIN

    @property
    def row_length(self) -> int:
        """Tokens in a row."""
        return self.program.per_row * self.max_seq_len

    @property
    def torch_dtype(self) -> torch.dtype:
        """--dtype; the parser chose one if none was given."""
        return getattr(torch, str(self.dtype))

    def tuning(self) -> Tuning:
        """The flags of the optimizer."""
        return Tuning(**{f.name: getattr(self, f.name) for f in fields(Tuning)})

    def architecture(self) -> dict[str, Any]:
        """The flags that size the model, by the names of MiniMindConfig's arguments."""
        others = {"preset", "tokenizer_path", "from_weight", "embedding_init", "look_back_heads"}
        names = {f.name for f in fields(ModelFlags)} - others
        return {name: getattr(self, name) for name in sorted(names)}


def config_type(program: Program) -> type[TrainConfig]:
    """TrainConfig, with the program's own flags."""
    if program.flags is None:
        return TrainConfig
    return dataclass(type("OwnConfig", (program.flags, TrainConfig), {}))


def skipped_updates(given: str | None) -> range:
    """``1207:1210`` -> updates 1207, 1208 and 1209. Raises: ValueError if it is not such a pair."""
    first, end = map(int, (given or "0:0").split(":"))
    if not 0 <= first <= end:
        raise ValueError(given)
    return range(first, end)
