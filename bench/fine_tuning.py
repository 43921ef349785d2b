"""How many useful tokens a second fine-tuning learns from: ours, MiniMind's script, TRL.

    python -m bench.fine_tuning --minimind minimind --python trl/bin/python --rounds 2

Useful are tokens with a loss, those of the assistant. Each program trains a new model of the demo's
size on the same conversations, as many rows of the same length an update, in turn, and prints a
line per update; the time between the first few and the last is what counts. MiniMind's script and
TRL's SFTTrainer run in ``--python``, which needs torch, transformers, datasets and trl.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measuring import ROOT, surroundings, words
from dataset.chat_datasets import SFTDataset
from dataset.conversations import chat_content
from dataset.token_cache import build_token_cache
from model.config import MiniMindConfig
from trainer.command_line import Parser
from trainer.program import run_program
from trainer.weights import load_tokenizer

WIDTH, LAYERS = 256, 4  # of the demo's model
SKIPPED = 5  # updates, in which caches fill
BY_TRL = """
import json, sys, torch, transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

data, tokenizer, *sizes, dtype, width, layers, inner, folder = sys.argv[1:]
rows, length, updates, width, layers, inner = map(int, (*sizes, width, layers, inner))
records = [json.loads(line)["conversations"] for line in open(data, encoding="utf-8")]
config = transformers.Qwen3Config(
    vocab_size=6400, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
    num_key_value_heads=4, head_dim=width // 8, intermediate_size=inner,
    tie_word_embeddings=True, max_position_embeddings=32768,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
class Each(transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        print("update", flush=True)
args = SFTConfig(
    output_dir=folder, per_device_train_batch_size=rows, max_length=length, packing=True,
    assistant_only_loss=True, max_steps=updates, use_cpu=True, bf16=dtype == "bfloat16",
    report_to=[], save_strategy="no", logging_steps=10**6, gradient_checkpointing=False,
)
trainer = SFTTrainer(
    model=transformers.Qwen3ForCausalLM(config), args=args, callbacks=[Each()],
    train_dataset=Dataset.from_list([{"messages": turns} for turns in records]),
    processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer),
)
labels = [row["labels"] for row in trainer.train_dataset]
learned = sum(label != -100 for row in labels for label in row)
open(f"{folder}.txt", "w").write(f"{learned} {len(labels)}")
trainer.train()
"""


def ends_of_updates(command: list, folder: Path, beginning: str, most: int) -> list[float]:
    """When each update ended, by the lines that a program prints; stopped after ``most``."""
    variables = os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    found: list[float] = []
    process = subprocess.Popen(
        [*map(str, command)], cwd=folder, env=variables, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            found.append(time.monotonic())
        if len(found) == most:
            process.terminate()
            break
    process.communicate()
    if len(found) <= SKIPPED + 1:
        raise SystemExit(f"{command[:2]} made {len(found)} updates, expected over {SKIPPED + 1}")
    return found


def labels_of(data: Path, tokenizer: str, length: int | None, folder: Path) -> int:
    """Labels of all conversations, of each only those within the first ``length`` tokens."""
    loaded = load_tokenizer(tokenizer)
    cache = build_token_cache([str(data)], loaded, folder, content=chat_content(loaded))
    assert cache.mask is not None
    spans = itertools.pairwise(cache.offsets.tolist())
    return sum(int(cache.mask[begin:end][:length].sum()) for begin, end in spans)


def shared_flags(args: argparse.Namespace) -> dict[str, object]:
    """Those that our program and MiniMind's have in common."""
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "from_weight": "none",
        "data_path": args.data_path.resolve(),
        "max_seq_len": args.length,
        "batch_size": args.rows,
        "log_interval": 1,
        "save_interval": 10**9,
    }


def ours(args: argparse.Namespace, folder: Path) -> tuple[list[float], float]:
    """train_full_sft.py: the ends of updates, and useful tokens of one."""
    flags = shared_flags(args) | {
        "eval_interval": 10**9,
        "heldout_fraction": 0,
        "epochs": 100,
        "device": "cpu",
        "dtype": args.dtype,
        "overwrite": 1,
        **{name: folder / name for name in ("save_dir", "checkpoint_dir", "cache_dir")},
    }
    command = [sys.executable, "train_full_sft.py", *words(flags)]
    tokenizer = load_tokenizer("model")
    data = SFTDataset(str(args.data_path), tokenizer, args.length, cache_dir=str(folder / "cache"))
    useful = data.in_row[0].sum().item() / len(data) * args.rows
    return ends_of_updates(command, ROOT, "epoch ", args.updates), useful


def minimind(args: argparse.Namespace, folder: Path) -> tuple[list[float], float]:
    """Its train_full_sft.py with its own tokenizer; on a CPU it computes in float32."""
    flags = shared_flags(args) | {"num_workers": 0, "save_dir": folder / "minimind"}
    command = [args.python.absolute(), "train_full_sft.py", *words(flags)]
    labels = labels_of(args.data_path, str(args.minimind / "model"), args.length, folder / "cache")
    rows = len(args.data_path.read_bytes().splitlines())
    ends = ends_of_updates(command, args.minimind / "trainer", "Epoch:", args.updates)
    return ends, labels / rows * args.rows


def trl(args: argparse.Namespace, folder: Path) -> tuple[list[float], float]:
    """SFTTrainer with packing and assistant_only_loss."""
    width = MiniMindConfig(hidden_size=WIDTH).intermediate_size
    given = [args.data_path.resolve(), ROOT / "model", args.rows, args.length, args.updates]
    given += [args.dtype, WIDTH, LAYERS, width, folder / "trl"]
    command = [args.python.absolute(), "-c", BY_TRL, *given]
    ends = ends_of_updates(command, folder, "update", args.updates)
    labels, rows = map(int, (folder / "trl.txt").read_text().split())
    return ends, labels / rows * args.rows


PROGRAMS = {"ours": ours, "MiniMind's train_full_sft.py": minimind, "TRL's SFTTrainer": trl}


def main() -> None:
    """Measure in turn, and print a table."""
    made = Parser(__doc__)
    made.set_defaults(device="cpu")  # the only one that all three were compared on
    add = made.add_argument
    add("--minimind", type=Path, required=True, help="a checkout of jingyaogong/minimind")
    add("--python", type=Path, required=True, help="an interpreter that has datasets and trl")
    add("--data_path", type=Path, default=ROOT / "dataset" / "chat_sample.jsonl", help="JSONL")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of ours and TRL")
    add("--rows", type=int, default=16, help="of an update")
    add("--length", type=int, default=256, help="tokens of a row, at most")
    add("--updates", type=int, default=30, help="of each program")
    add("--rounds", type=int, default=2, help="how often each is run, in turn")
    args = made.parse_args()
    found: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    per_update = dict[str, float]()
    for _ in range(args.rounds):
        for name, run in PROGRAMS.items():
            with tempfile.TemporaryDirectory() as folder:
                ends, per_update[name] = run(args, Path(folder))
            speed = (len(ends) - 1 - SKIPPED) / (ends[-1] - ends[SKIPPED])
            found[name].append(speed * per_update[name])
            print(f"{name}: {found[name][-1]:.0f} useful tokens/s", file=sys.stderr)
    print(f"\n{surroundings(args, 'bench.fine_tuning')}\n")
    print("| program | useful tokens of an update | useful tokens/s | ours over it, each round |")
    print("|---|---|---|---|")
    for name, speeds in found.items():
        ratios = (a / b for a, b in zip(found["ours"], speeds, strict=True))
        print(
            f"| {name} | {per_update[name]:.0f} | {', '.join(f'{s:.0f}' for s in speeds)} "
            f"| {', '.join(f'{r:.2f}' for r in ratios)} |"
        )


if __name__ == "__main__":
    sys.exit(run_program(main))
