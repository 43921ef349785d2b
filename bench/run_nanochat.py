"""nanochat as an opponent: trains it on a JSONL corpus, and scores it on texts of another file.

    git clone https://github.com/karpathy/nanochat
    python bench/run_nanochat.py --checkout nanochat --data_path train.jsonl --score texts.jsonl \\
        --tokens 585000 --rate_factor 20

Runs with a Python that has nanochat's dependencies (torch, pyarrow, rustbpe, tiktoken, wandb, ...),
and calls only its programs and public functions: scripts.tok_train, scripts.base_train,
load_model. Its tokenizer is trained on the same corpus. All its learning rates are those that it
computes for the size of the update, times --rate_factor. Prints one line of JSON.
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

RATES = {"embedding": 0.3, "unembedding": 0.008, "matrix": 0.02, "scalar": 0.5}  # its defaults
DOCUMENTS_IN_A_GROUP = 1000  # of a parquet file's rows: it reads one group at a time
ROWS_AT_ONCE = 20  # scored in one pass


def full_path(given: str) -> Path:
    """nanochat's programs run in its folder, where a relative path would mean another file."""
    return Path(given).resolve()


def texts_of(path: Path) -> list[str]:
    """The documents of a JSONL file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def write_corpus(folder: Path, texts: list[str]) -> None:
    """Two parquet files: nanochat trains on the first and takes the last for its own validation."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((texts, texts[:DOCUMENTS_IN_A_GROUP])):
        table = pyarrow.table({"text": part})
        path = folder / f"shard_{number:05d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=DOCUMENTS_IN_A_GROUP)


def run(args: argparse.Namespace, *words: object) -> str:
    """A Python command beside nanochat. Returns: what it printed. Raises: SystemExit if it
    fails."""
    own = {"NANOCHAT_BASE_DIR": str(args.folder), "WANDB_MODE": "disabled"}
    own["PYTHONPATH"] = str(args.checkout)
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=args.checkout, env=os.environ | own, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def train(args: argparse.Namespace) -> dict:
    """Train its tokenizer, unless the folder has one, and its model. Returns: what the log says."""
    texts = texts_of(args.data_path)
    random.Random(args.seed).shuffle(texts)
    write_corpus(args.folder / "base_data_climbmix", texts)
    if not (args.folder / "tokenizer").exists():
        run(args, "-m", "scripts.tok_train", "--vocab-size", args.vocab_size)
    updates = round(args.tokens / (args.rows * args.row_length))
    rates = [f"--{name}-lr={value * args.rate_factor}" for name, value in RATES.items()]
    log = run(
        args,
        *("-m", "scripts.base_train"),
        *("--depth", args.depth, "--head-dim", args.head_dim, "--window-pattern", "L"),
        *("--max-seq-len", args.row_length, "--device-batch-size", args.rows),
        *("--total-batch-size", args.rows * args.row_length, "--num-iterations", updates),
        *("--warmup-steps", args.warmup_updates, "--device-type", args.device, *rates),
        *("--eval-every", -1, "--core-metric-every", -1, "--sample-every", -1),
    )
    milliseconds = [float(found) for found in re.findall(r"dt: ([\d.]+)ms", log)]
    return {
        "updates": updates,
        "tokens": updates * args.rows * args.row_length,
        # Its first updates compile, as ours do not here.
        "seconds": sorted(milliseconds)[len(milliseconds) // 2] * updates / 1000,
    }


def score(path: Path, device: torch.device, updates: int) -> dict:
    """Bits per byte of the texts, each after a BOS of its own, by the model after this many
    updates: the folder may hold those of other runs. nanochat must be importable."""
    from nanochat.checkpoint_manager import load_model

    model, tokenizer, _ = load_model("base", device, phase="eval", step=updates)
    nats = num_bytes = num_tokens = 0
    texts = texts_of(path)
    for first in range(0, len(texts), ROWS_AT_ONCE):
        part = texts[first : first + ROWS_AT_ONCE]
        rows = [[tokenizer.get_bos_token_id(), *tokenizer.encode(text)] for text in part]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            logits = model(ids[:, :-1]).float().flatten(0, 1)
            losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(rows), -1)
        nats += sum(losses[i, : len(row) - 1].sum().item() for i, row in enumerate(rows))
        num_tokens += sum(map(len, rows)) - len(rows)
        num_bytes += sum(len(text.encode()) for text in part)
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "bytes_per_token": num_bytes / num_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    """Train and score."""
    if sys.argv[1:2] == ["--score_here"]:  # in the process that ``run`` starts
        path, device, updates = sys.argv[2:]
        return print(json.dumps(score(Path(path), torch.device(device), int(updates))))
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--checkout", required=True, type=full_path, help="nanochat's repository")
    cli.add_argument("--data_path", required=True, type=Path, help="JSONL to train on")
    cli.add_argument("--score", required=True, type=Path, help="JSONL to score")
    cli.add_argument("--folder", required=True, type=full_path, help="its base folder; kept")
    cli.add_argument("--tokens", required=True, type=int)
    cli.add_argument("--rate_factor", type=float, default=1.0, help="of all its learning rates")
    cli.add_argument("--rows", type=int, default=8, help="of an update")
    cli.add_argument("--row_length", type=int, default=340)
    cli.add_argument("--warmup_updates", type=int, default=10)
    cli.add_argument("--depth", type=int, default=4)
    cli.add_argument("--head_dim", type=int, default=64)
    cli.add_argument("--vocab_size", type=int, default=6400)
    cli.add_argument("--device", default="cpu")
    cli.add_argument("--seed", type=int, default=1, help="of the order of documents")
    args = cli.parse_args()
    trained = train(args)
    here = [Path(__file__).resolve(), "--score_here", args.score.resolve(), args.device]
    here.append(trained["updates"])
    print(json.dumps(trained | json.loads(run(args, *here).splitlines()[-1])))


if __name__ == "__main__":
    main()
