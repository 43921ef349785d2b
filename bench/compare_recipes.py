"""What a token and a minute teach: MiniMind's padded recipe, and ours, on the same text.

    python -m bench.compare_recipes --data_path corpus.jsonl --device cpu --minutes 20

The last 5 % of the documents are kept aside. Each run is the real program, one after another, alone
on the machine, planned to end when its minutes are over; looking at the documents kept aside stops
its clock, and so does Ctrl-Z (`kill -TSTP` to its process group) until it goes on. The padded
recipe's rate is tuned: the best of --padded_rates at the first seed.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import train_pretrain
from bench.benchmark import PADDED, PADDED_LENGTH, padded_flags
from bench.measuring import OURS, NoGuard, parser, reports, surroundings, train, words
from dataset.lm_dataset import Batch, PretrainDataset
from dataset.token_cache import build_token_cache
from trainer.evaluation import bits_per_byte, held_out_nats
from trainer.plan import Budget, process_start
from trainer.progress import Outcome
from trainer.run import Run
from trainer.weights import load_tokenizer

HELD_OUT = 0.05  # of the documents, the last ones
ASIDE_TOKENS = 2**17  # of them that are looked at: every n-th document
AT_ONCE = 32  # of their rows
OUR_FLAGS = {
    "cpu": {
        "optimizer": "muon",
        "lr_schedule": "wsd",
        "warmup_ratio": 0,
        "decay_ratio": 0.6,
        "learning_rate": 8e-3,
        "batch_size": 8,
        "accumulation_steps": 1,
    },
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


class Watch(NoGuard):
    """Guard and step of a trial: plans it to end in time, and looks at the documents kept aside, at
    equal times and at the end. Its clock stands still meanwhile.

    Args:
        kept_aside: JSONL; looks: how many."""

    def __init__(self, pipe: Connection, trial: Trial, kept_aside: str, looks: int) -> None:
        self.pipe, self.kept_aside = pipe, kept_aside
        self.seconds, self.begun = 60 * trial.minutes, process_start()
        self.next_look = self.between_looks = self.seconds / looks
        self.seconds_lost = 0.0  # while the clock stood still
        self.updates = self.tokens = 0

    def clock(self) -> float:
        """Seconds, without those that were lost."""
        return time.monotonic() - self.seconds_lost

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """What happens inside takes no time."""
        lost_before, since = self.seconds_lost, time.monotonic()
        yield
        self.seconds_lost = lost_before + time.monotonic() - since

    def pause(self, *_: object) -> None:
        """What a handler of SIGTSTP does: sleep until somebody sends SIGCONT."""
        with self.standing_still():
            os.kill(os.getpid(), signal.SIGSTOP)

    def begin(self, run: Run, state: None, num_bad_records: int) -> bool:
        """Plan by this clock, and open what is kept aside."""
        run.budget = Budget(self.seconds, clock=self.clock, begun=self.begun)
        with self.standing_still():
            data = PretrainDataset(
                [self.kept_aside],
                load_tokenizer(run.args.tokenizer_path),
                PADDED_LENGTH,
                cache_dir=run.args.cache_dir,
            )
            every = max(1, data.num_tokens // ASIDE_TOKENS)
            self.aside = data.for_evaluation(data.documents[::every])
        return super().begin(run, state, num_bad_records)

    def step(self, run: Run, window: list[Batch], num_labels: int) -> Outcome:
        """One update, and a look if it is time."""
        outcome = train_pretrain.train_step(run, window, num_labels)
        self.updates += 1
        self.tokens += num_labels
        if self.clock() - self.begun > self.next_look:
            self.next_look += self.between_looks
            self.look()
        return outcome

    @contextlib.contextmanager
    def training(self, run: Run) -> Iterator[None]:
        """All updates happen inside; at the end comes the last look."""
        yield
        self.look()

    def look(self) -> None:
        """Send what the model has cost, and how good it is."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = self.clock() - self.begun
        with self.standing_still():
            rows = range(len(self.aside))
            batches = (
                self.aside.__getitems__([*rows[i : i + AT_ONCE]])
                for i in range(0, len(rows), AT_ONCE)
            )
            with self.run.autocast:
                nats, _ = held_out_nats(self.run.model, batches)
            score = bits_per_byte(nats, self.aside.num_text_bytes)
        self.pipe.send(
            {
                "seconds": seconds,
                "tokens": self.tokens,
                "updates": self.updates,
                "bits_per_byte": score,
            }
        )


def child(pipe: Connection, trial: Trial, flags: list[str], kept_aside: str, looks: int) -> None:
    """Train with the recipe of this trial, and send the points of its curve."""
    watch = Watch(pipe, trial, kept_aside, looks)
    signal.signal(signal.SIGTSTP, watch.pause)
    train(flags, watch, (PADDED if trial.padded else OURS)._replace(step=watch.step))


def run_trial(trial: Trial, args: argparse.Namespace, parts: tuple[Path, Path]) -> Trial:
    """Fill in the trial's points."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "preset": args.preset,
            "device": args.device,
            "seed": trial.seed,
            "max_minutes": trial.minutes,
            "data_path": parts[0],
            "save_dir": folder,
            "cache_dir": parts[0].parent / "cache",
            "log_interval": 10**6,
            "save_interval": 10**9,
            "eval_interval": 10**9,
            "heldout_fraction": 0,
        } | trial.flags
        trial.points += reports(
            f"{trial.name}, seed {trial.seed}",
            child,
            trial,
            words(flags),
            str(parts[1]),
            args.looks,
        )
    last = trial.final
    print(
        f"{trial.name}, seed {trial.seed}, {trial.minutes:g} minutes: {last['updates']:,} "
        f"updates, {last['tokens']:,} tokens, {last['bits_per_byte']:.4f} bits/byte",
        file=sys.stderr,
    )
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
        "| share of its time | as good |",
        "|---|---|---|---|---|---|---|---|",
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
        lines.append(
            f"\nThe longest of ours passed the padded recipe's {target:.4f} within "
            f"{', '.join(f'{s:.3f}' for s in shares)} of its {unit}."
        )
    return "\n".join(lines)


def main() -> None:
    """Run all trials, and print the table."""
    cli = parser(__doc__)
    cli.add_argument("--data_path", required=True, type=Path, help="JSONL")
    cli.add_argument("--preset", default="demo")
    cli.add_argument("--minutes", type=float, default=20, help="of the padded recipe")
    cli.add_argument("--ours_minutes", type=float, nargs="+", help="None: a tenth, and as many")
    cli.add_argument("--padded_rates", type=float, nargs="+", default=[5e-4, 2e-3, 4e-3])
    cli.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    cli.add_argument("--looks", type=int, default=10, help="at what was kept aside, in each run")
    cli.add_argument("--ours", nargs="*", default=[], help="name=value: flags of ours to change")
    cli.add_argument("--only", choices=["padded", "ours"], help="the other is not run")
    cli.add_argument("--json", type=Path, help="all points; what it holds is not run again")
    args = cli.parse_args()
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
    padded, ours = [], []
    if args.only != "ours":
        base = padded_flags(on_cuda)
        first = [
            tried(
                f"padded, rate {rate:g}",
                base | {"learning_rate": rate},
                args.minutes,
                args.seeds[0],
                True,
            )
            for rate in args.padded_rates
        ]
        best = min(first, key=lambda trial: trial.final["bits_per_byte"])
        padded = [tried(best.name, best.flags, args.minutes, s, True) for s in args.seeds]
    if args.only != "padded":
        changes = dict(word.split("=", 1) for word in args.ours)
        flags = OUR_FLAGS["cuda" if on_cuda else "cpu"] | {"max_seq_len": PADDED_LENGTH} | changes
        name = " ".join(["ours", *args.ours])
        for minutes in args.ours_minutes or (args.minutes / 10, args.minutes):
            ours += [tried(name, flags, minutes, seed) for seed in args.seeds]
    print(surroundings(args, "bench.compare_recipes"))
    if padded and ours:
        print("\n" + report(args, padded, ours))


if __name__ == "__main__":
    main()
