"""What a token and a minute teach: MiniMind's padded recipe, and ours, on the same text.

    python scripts/compare_recipes.py --data_path corpus.jsonl --device cpu --minutes 20

The last 5 % of the documents are kept aside. Each run is the real program, one after another, alone
on the machine, planned to end when its minutes are over; looking at the documents kept aside stops
its clock, and so does Ctrl-Z (`kill -TSTP` to its process group) until it goes on. The padded
recipe's rate is tuned: the best of --padded_rates at the first seed.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # python puts scripts/ there, as it is this file's folder

from scripts import benchmark  # noqa: E402
from scripts.measuring import surroundings  # noqa: E402

HELD_OUT = 0.05  # of the documents, the last ones
ASIDE_TOKENS = 2**17  # of them that are looked at: every n-th document
ROW_LENGTH = 340  # of the padded recipe's rows, and of those kept aside
OURS = {
    "cpu": {"optimizer": "muon", "lr_schedule": "wsd", "warmup_ratio": 0, "decay_ratio": 0.6,
            "learning_rate": 8e-3, "batch_size": 8, "accumulation_steps": 1},
    "cuda": {"optimizer": "muon", "lr_schedule": "wsd", "decay_ratio": 0.6, "learning_rate": 2e-3},
}


@dataclass
class Trial:
    """One run: flags over the preset's, and the points of its curve."""

    name: str
    flags: dict[str, object]
    minutes: float
    seed: int
    padded: bool = False
    points: list[dict] = field(default_factory=list)  # seconds, tokens, updates, bits per byte

    @property
    def final(self) -> dict:
        """What it ended with."""
        return self.points[-1]


def split(path: Path, folder: Path) -> tuple[Path, Path]:
    """The corpus without its last documents, and those."""
    lines = path.read_bytes().splitlines(keepends=True)
    cut = round(len(lines) * (1 - HELD_OUT))
    parts = folder / "train.jsonl", folder / "kept_aside.jsonl"
    for part, chosen in zip(parts, (lines[:cut], lines[cut:]), strict=True):
        part.write_bytes(b"".join(chosen))
    return parts


def child(pipe: Connection, trial: Trial, argv: list[str], kept_aside: str, looks: int) -> None:
    """Train with the real program; look at what was kept aside at equal times and at the end."""
    import torch

    import train_pretrain
    from dataset.lm_dataset import PretrainDataset
    from trainer import metrics
    from trainer.evaluation import bits_per_byte, held_out_nats
    from trainer.plan import Budget, process_start

    seconds, begun = 60 * trial.minutes, process_start()
    lost, tokens, next_look = 0.0, 0, seconds / looks

    def clock() -> float:
        return time.monotonic() - lost

    def stand_still(*_: object) -> None:
        nonlocal lost
        since = time.monotonic()
        os.kill(os.getpid(), signal.SIGSTOP)
        lost += time.monotonic() - since

    signal.signal(signal.SIGTSTP, stand_still)
    train_pretrain.Budget = partial(Budget, clock=clock, begun=begun)
    if trial.padded:
        benchmark.DATA_PATH = [argv[argv.index("--data_path") + 1]]
        benchmark.padded_recipe()
    step, Metrics = train_pretrain.train_step, metrics.Metrics
    aside = None

    def look(run: train_pretrain.Run) -> None:
        nonlocal lost, aside
        since = time.monotonic()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        spent = clock() - begun
        if aside is None:
            tokenizer = train_pretrain.load_tokenizer(run.args.tokenizer_path)
            aside = PretrainDataset(
                [kept_aside], tokenizer, ROW_LENGTH, cache_dir=run.args.cache_dir
            )
            every = max(1, aside.num_tokens // ASIDE_TOKENS)
            aside = aside.for_evaluation(aside.documents[::every])
        rows, size = range(len(aside)), 32
        batches = [aside.__getitems__(list(rows[i : i + size])) for i in range(0, len(rows), size)]
        with run.autocast:
            nats, _ = held_out_nats(run.model, batches)
        point = {"seconds": spent, "tokens": tokens, "updates": run.step}
        pipe.send(point | {"bits_per_byte": bits_per_byte(nats, aside.num_text_bytes)})
        lost += time.monotonic() - since

    def counted(run: train_pretrain.Run, window: list, num_labels: int) -> torch.Tensor:
        nonlocal tokens, next_look
        outcome = step(run, window, num_labels)
        tokens += num_labels
        if clock() - begun > next_look:
            next_look += seconds / looks
            look(run)
        return outcome

    class Last(Metrics):
        def close(self) -> None:
            look(self.run)
            super().close()

    train_pretrain.train_step, metrics.Metrics = counted, Last
    train_pretrain.evaluate = lambda run, *_: (
        setattr(run.progress, "evaluated_step", run.step) or True
    )
    with contextlib.redirect_stdout(io.StringIO()):
        status = train_pretrain.main(argv)
    pipe.send({"ended": status})


def run_trial(trial: Trial, args: argparse.Namespace, parts: tuple[Path, Path]) -> Trial:
    """Fill in the trial's points."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "preset": args.preset, "device": args.device, "seed": trial.seed,
            "max_minutes": trial.minutes, "save_dir": folder, "checkpoint_dir": folder,
            "cache_dir": parts[0].parent / "cache", "log_interval": 10**6,
            "save_interval": 10**9, "eval_interval": 10**9, "heldout_fraction": 0,
            "optimizer": "adamw", "lr_schedule": "cosine",  # the padded recipe's
        } | trial.flags
        argv = ["--data_path", str(parts[0])]
        argv += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        ours, theirs = context.Pipe()
        process = context.Process(
            target=child, args=(theirs, trial, argv, str(parts[1]), args.looks)
        )
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while "ended" not in (point := ours.recv()):
                trial.points.append(point)
        process.join()
    if process.exitcode or not trial.points:
        raise SystemExit(f"{trial.name}, seed {trial.seed}: failed, the cause is above")
    last = trial.final
    print(f"{trial.name}, seed {trial.seed}, {trial.minutes:g} minutes: {last['updates']:,} "
          f"updates, {last['tokens']:,} tokens, {last['bits_per_byte']:.4f} bits/byte",
          file=sys.stderr)
    return trial


def needed(trial: Trial, target: float, unit: str) -> float:
    """Tokens or seconds at which a curve first comes down to ``target``; inf if never.

    Along a line between the looks, in the logarithm of the unit."""
    before = None
    for point in trial.points:
        if point["bits_per_byte"] <= target:
            if before is None:
                return point[unit]
            fall = before["bits_per_byte"] - point["bits_per_byte"]
            part = (before["bits_per_byte"] - target) / fall
            return math.exp((1 - part) * math.log(before[unit]) + part * math.log(point[unit]))
        before = point
    return math.inf


def report(args: argparse.Namespace, padded: list[Trial], ours: list[Trial]) -> str:
    """Markdown: what each ended with, and the share of the padded recipe's cost that ours needs."""
    target = statistics.mean(trial.final["bits_per_byte"] for trial in padded)
    tokens = statistics.mean(trial.final["tokens"] for trial in padded)
    lines = [
        "| recipe | minutes | updates | tokens | bits/byte, seeds | share of the padded's tokens "
        "| share of its time | as good |", "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[Trial]] = {}
    for trial in [*padded, *ours]:
        groups.setdefault((trial.name, trial.minutes), []).append(trial)
    for (name, minutes), trials in groups.items():
        values = [trial.final["bits_per_byte"] for trial in trials]
        mean = {k: statistics.mean(t.final[k] for t in trials) for k in ("updates", "tokens")}
        lines.append(
            f"| {name} | {minutes:g} | {mean['updates']:,.0f} | {mean['tokens']:,.0f} "
            f"| {', '.join(f'{v:.4f}' for v in values)} | {mean['tokens'] / tokens:.2f} "
            f"| {minutes / args.minutes:.2f} | {'yes' if max(values) <= target else 'no'} |"
        )
    longest = [t for t in ours if t.minutes == max(t.minutes for t in ours)]
    for unit, whole in (("tokens", tokens), ("seconds", 60 * args.minutes)):
        shares = [needed(trial, target, unit) / whole for trial in longest]
        lines.append(f"\nThe longest of ours passed the padded recipe's {target:.4f} within "
                     f"{', '.join(f'{s:.3f}' for s in shares)} of its {unit}.")
    return "\n".join(lines)


def main() -> None:
    """Run all trials, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", required=True, type=Path, help="JSONL")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu; None: the best there is")
    parser.add_argument("--minutes", type=float, default=20, help="of the padded recipe")
    parser.add_argument("--ours_minutes", type=float, nargs="+", help="None: a tenth, and as many")
    parser.add_argument("--padded_rates", type=float, nargs="+", default=[5e-4, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--looks", type=int, default=10, help="at what was kept aside, in each run")
    parser.add_argument("--ours", nargs="*", default=[], help="name=value: flags of ours to change")
    parser.add_argument("--only", choices=["padded", "ours"], help="the other is not run")
    parser.add_argument("--json", type=Path, help="all points; what it holds is not run again")
    args = parser.parse_args()
    from dataset.token_cache import build_token_cache
    from trainer.device import default_device
    from trainer.weights import load_tokenizer

    args.device = args.device or default_device()
    folder = Path(tempfile.mkdtemp())
    parts = split(args.data_path, folder)
    tokenizer = load_tokenizer("model")
    for part in parts:  # before any clock runs
        build_token_cache([str(part)], tokenizer, str(folder / "cache"))
    done = json.loads(args.json.read_text()) if args.json and args.json.exists() else []

    def tried(name: str, flags: dict, minutes: float, seed: int, padded: bool = False) -> Trial:
        for old in done:
            if all(old[k] == v for k, v in (("name", name), ("minutes", minutes), ("seed", seed))):
                return Trial(**old)
        trial = run_trial(Trial(name, flags, minutes, seed, padded), args, parts)
        done.append(vars(trial))
        if args.json:
            args.json.write_text(json.dumps(done, indent=1))
        return trial

    on_cuda = args.device.startswith("cuda")
    base = {
        "packing": 0, "max_seq_len": ROW_LENGTH, "batch_size": 32, "accumulation_steps": 8,
        "micro_batch_size": 32, "use_compile": 0, "dtype": "bfloat16" if on_cuda else "float32",
        "num_workers": 8 if on_cuda else 0, "warmup_ratio": 0,
    }
    padded, ours = [], []
    if args.only != "ours":
        first = [tried(f"padded, rate {rate:g}", base | {"learning_rate": rate}, args.minutes,
                       args.seeds[0], True) for rate in args.padded_rates]
        best = min(first, key=lambda trial: trial.final["bits_per_byte"])
        padded = [tried(best.name, best.flags, args.minutes, s, True) for s in args.seeds]
    if args.only != "padded":
        changes = dict(word.split("=", 1) for word in args.ours)
        flags = OURS["cuda" if on_cuda else "cpu"] | {"max_seq_len": ROW_LENGTH} | changes
        name = " ".join(["ours", *args.ours])
        for minutes in args.ours_minutes or (args.minutes / 10, args.minutes):
            ours += [tried(name, flags, minutes, seed) for seed in args.seeds]
    print(surroundings(args, "scripts/compare_recipes.py"))
    if padded and ours:
        print("\n" + report(args, padded, ours))


if __name__ == "__main__":
    main()
