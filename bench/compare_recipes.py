"""Which recipe learns most from the same tokens: ours, against opponents who had their chance.

    python -m bench.compare_recipes --data_path corpus.jsonl --device cpu --tokens 600000
    python -m bench.compare_recipes --data_path corpus.jsonl --device cuda --jobs 12 \\
        --tokens 600000 2000000 6000000 --seeds 1 2 3 --json results.json

The last 5 % of the documents are kept aside; scored are 338 tokens of each of some of those, after
a BOS. Each opponent's settings are swept, one after another, at the first seed; the best go on with
all seeds. A run sees a fixed number of tokens, so how busy the machine is changes nothing, and it
is made once: --json keeps it, under a hash of the code that decides and of its settings. Ours is
run with fewer tokens as well, each time to the end of its schedule: what share of an opponent's
tokens it needs is read between those. nanochat takes part through bench/run_nanochat.py.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_pretrain
from bench.benchmark import PADDED, PADDED_LENGTH, MuonInALoop, padded_flags
from bench.measuring import (
    OURS,
    ROOT,
    NoGuard,
    Parts,
    built_with,
    parser,
    surroundings,
    train,
    words,
)
from dataset.lm_dataset import Batch, PretrainDataset
from dataset.token_cache import TokenCache, build_token_cache
from model.model_minimind import next_token_nats
from trainer.checkpoint import write_atomically
from trainer.errors import BadUpdateError
from trainer.evaluation import bits_per_byte
from trainer.muon import Muon
from trainer.progress import Outcome
from trainer.run import Run
from trainer.samples import continuations
from trainer.weights import load_tokenizer

HELD_OUT = 0.05  # of the documents, the last ones
SCORED = 200  # documents of those
SCORED_TOKENS = PADDED_LENGTH - 2  # of each
SHARES = (1.0, 0.8, 0.64, 0.5, 0.35, 0.25)  # of the tokens, with which ours is run
DECIDING = (  # code; its comments do not decide
    "train_pretrain.py",
    *("model/config.py", "model/documents.py", "model/model_minimind.py"),
    *("dataset/lm_dataset.py", "dataset/token_cache.py", "bench/compare_recipes.py"),
    *("trainer/auto.py", "trainer/bigrams.py", "trainer/command_line.py", "trainer/flags.py"),
    *("trainer/muon.py", "trainer/optimizer.py", "trainer/run.py", "trainer/schedule.py"),
)
REPEATS = "repeated_4grams"
Flags = dict[str, Any]


# ------------------------------------------------------------------------------------- recipes


def torch_s_muon(run: Run) -> None:
    """torch.optim.Muon and torch.optim.AdamW with PyTorch's defaults in place of ours."""
    assert isinstance(run.optimizer, Muon)
    for group in run.optimizer.param_groups:
        group |= {"weight_decay": 0.01, "lr_scale": 1.0, "lr": 1e-3, "betas": (0.9, 0.999)}
    run.optimizer = MuonInALoop(run.optimizer)


@dataclass(frozen=True)
class Recipe:
    """Flags over the preset's, where a sweep of them begins, and the values that it tries."""

    flags: Flags
    axes: Mapping[str, tuple] = field(default_factory=dict)
    parts: Parts = OURS
    padded: bool = False


RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
PACKED: Flags = {"max_seq_len": PADDED_LENGTH, "accumulation_steps": 1, "batch_size": 8}
SMALL_UPDATES = {"learning_rate": RATES, "batch_size": (2, 4, 8, 16)}
SCHEDULE = {"warmup_ratio": (0.0, 0.05, 0.1), "decay_ratio": (0.4, 0.6, 0.85)}


# What --recipe best consists of, each part left out alone.
RANDOM = {"embedding_init": "random", "look_back_heads": 0}
ABLATIONS: dict[str, Flags] = {
    "random start": RANDOM,
    "random start, tied": RANDOM | {"tie_word_embeddings": 1},
    "no heads that look back": {"look_back_heads": 0},
    "rows' second moments left out": {"muon_beta2": 0},
    "momentum 0.95": {"muon_momentum": 0.95},
    "each matrix in each update": {"muon_period": 1},
    "AdamW's usual betas": {"adam_beta1": 0.9, "adam_beta2": 0.95},
    "one rate for all": {"embedding_lr_scale": 1, "head_lr_scale": 1, "vector_lr_scale": 1},
    "decay over 0.4": {"decay_ratio": 0.4},
    "no warm-up": {"warmup_ratio": 0},
}


def recipes(on_cuda: bool) -> dict[str, Recipe]:
    """By name; the last is ours, and those before it are ours with a change."""
    plain = PACKED | {"warmup_ratio": 0.05, "decay_ratio": 0.6, "lr_schedule": "wsd"}
    adamw = plain | {"optimizer": "adamw", "learning_rate": 4e-3}
    muon = plain | {"optimizer": "muon", "learning_rate": 4e-3}
    padded = padded_flags(on_cuda) | {"num_workers": 0, "learning_rate": 2e-3}
    default = PACKED | {"optimizer": "muon", "learning_rate": 1e-3, "lr_schedule": "cosine"}
    best = {"max_seq_len": PADDED_LENGTH, "recipe": "best"}
    ours = best | {"learning_rate": 3e-3, "batch_size": 4}
    axes = SMALL_UPDATES | SCHEDULE | {"lr_schedule": ("wsd", "cosine")}
    return {
        "MiniMind, padded": Recipe(padded, {"learning_rate": RATES[:5]}, PADDED, padded=True),
        "AdamW, packed": Recipe(adamw, axes),
        "torch's Muon, its defaults": Recipe(
            default, {}, OURS._replace(build_run=built_with(torch_s_muon))
        ),
        "plain Muon": Recipe(muon, SMALL_UPDATES | SCHEDULE),
        **{f"ours, {name}": Recipe(ours | change) for name, change in ABLATIONS.items()},
        "ours, rate and rows auto": Recipe(best),
        "ours": Recipe(ours, SMALL_UPDATES),
    }


# ---------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Trial:
    """What decides the result of a run, besides the corpus and the code."""

    recipe: str
    flags: Flags
    tokens: int
    seed: int

    def key(self, fixed: str) -> str:
        """A hash of all that decides; ``fixed`` is what the trials of a contest have in common."""
        own = json.dumps([self.recipe, sorted(self.flags.items()), self.tokens, self.seed])
        return hashlib.sha256(f"{fixed} {own}".encode()).hexdigest()[:16]


def code_digest() -> str:
    """A hash of the code that decides the result, without comments, docstrings and layout."""
    return hashlib.sha256("".join(bare(ROOT / name) for name in DECIDING).encode()).hexdigest()


def bare(path: Path) -> str:
    """The code of a file without what has no effect."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.dump(tree)


def split(path: Path, folder: Path) -> tuple[Path, Path]:
    """The corpus without its last documents, and those."""
    lines = path.read_bytes().splitlines(keepends=True)
    cut = round(len(lines) * (1 - HELD_OUT))
    parts = folder / "train.jsonl", folder / "kept_aside.jsonl"
    for part, chosen in zip(parts, (lines[:cut], lines[cut:]), strict=True):
        part.write_bytes(b"".join(chosen))
    return parts


def excerpt(source: Path, cache: TokenCache, tokens: int, padded: bool) -> Path:
    """The first documents of a file that give so many tokens with a loss: in padded rows, what is
    cut off does not count."""
    path = source.with_name(f"{source.stem}_{tokens}{'_padded' * padded}.jsonl")
    if not path.exists():
        lengths = cache.offsets[1:] - cache.offsets[:-1] + 1  # and EOS
        if padded:
            lengths = lengths.clamp(max=PADDED_LENGTH - 1)
        enough = int(torch.searchsorted(lengths.cumsum(0), tokens)) + 1
        lines = source.read_bytes().splitlines(keepends=True)
        if enough > len(lines):
            raise SystemExit(f"{source}: has fewer than {tokens:,} tokens")
        own = path.with_name(f"{path.name}.{os.getpid()}")  # others may want it at the same time
        own.write_bytes(b"".join(lines[:enough]))
        with contextlib.suppress(FileExistsError):  # the first stays: it may be in use already
            os.link(own, path)
        own.unlink()
    return path


@functools.cache
def scored_rows(kept_aside: Path, cache_dir: Path) -> tuple[Tensor, int, list[str]]:
    """(SCORED, 1 + SCORED_TOKENS) int64: BOS and tokens; their bytes; and their texts.

    A character that the cut splits counts as none."""
    tokenizer = load_tokenizer("model")
    data = PretrainDataset(
        [str(kept_aside)], tokenizer, PADDED_LENGTH, cache_dir=str(cache_dir)
    ).cache
    lengths = data.offsets[1:] - data.offsets[:-1]
    long = torch.where(lengths >= SCORED_TOKENS)[0]
    chosen = long[:: max(1, len(long) // SCORED)][:SCORED].tolist()
    rows = [data.tokens[begin : begin + SCORED_TOKENS] for begin in data.offsets[chosen].tolist()]
    ids = torch.stack(rows).to(torch.int64) & 0xFFFF
    texts = [text.rstrip("\ufffd") for text in tokenizer.batch_decode(ids)]
    bos = torch.full((len(ids), 1), int(tokenizer.bos_token_id))
    return torch.cat((bos, ids), 1), sum(len(text.encode()) for text in texts), texts


class Watch(NoGuard):
    """Takes the time of the updates, and scores the model after the last one."""

    def __init__(self, kept_aside: Path, cache_dir: Path) -> None:
        self.aside = kept_aside, cache_dir
        self.found: dict[str, float] = {"updates": 0, "tokens": 0}

    def step(self, run: Run, window: list[Batch], num_labels: int) -> Outcome:
        """One update."""
        self.found["updates"] += 1
        self.found["tokens"] += num_labels
        return train_pretrain.train_step(run, window, num_labels)

    @contextlib.contextmanager
    def training(self, run: Run) -> Iterator[None]:
        """All updates happen inside."""
        since = time.monotonic()
        yield
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        self.found["seconds"] = time.monotonic() - since
        self.found["bits_per_byte"] = self.score(run)
        self.found[REPEATS] = continuations(run.model, load_tokenizer("model"))[1]

    @torch.inference_mode()
    def score(self, run: Run) -> float:
        """Held-out bits per byte, in float32 throughout."""
        run.model.model.residual_dtype = None
        ids, num_bytes, _ = scored_rows(*self.aside)
        run.model.eval()
        logits = (run.model(part).logits for part in ids.to(run.device).split(20))
        parts = zip(logits, ids.to(run.device).split(20), strict=True)
        return bits_per_byte(sum(next_token_nats(*part).item() for part in parts), num_bytes)


def run_trial(trial: Trial, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train and score, in this process."""
    recipe = recipes(args.device.startswith("cuda"))[trial.recipe]
    cache_dir = folder / "cache"
    cache = build_token_cache([str(folder / "train.jsonl")], load_tokenizer("model"), cache_dir)
    watch = Watch(folder / "kept_aside.jsonl", cache_dir)
    with tempfile.TemporaryDirectory() as outputs:
        flags = {
            "preset": args.preset,
            "device": args.device,
            "use_compile": 0,
            "seed": trial.seed,
            "epochs": 1,
            "data_path": excerpt(folder / "train.jsonl", cache, trial.tokens, recipe.padded),
            "save_dir": outputs,
            "cache_dir": cache_dir,
            "log_interval": 10**6,
            "eval_interval": 10**9,
            "heldout_fraction": 0,
        }
        try:
            train(words(flags | trial.flags), watch, recipe.parts._replace(step=watch.step))
        except SystemExit as error:
            if error.code != BadUpdateError.exit_status:
                raise
    if not math.isfinite(watch.found.get("bits_per_byte", math.inf)):
        # It diverged: as bad as can be, and no error.
        watch.found |= {"bits_per_byte": math.inf, REPEATS: 1.0}
        watch.found.setdefault("seconds", math.inf)
    return watch.found


def start_worker(threads: int) -> None:
    """A process that makes runs, one after another."""
    torch.set_num_threads(threads)


@dataclass
class Contest:
    """Makes runs, unless they were made."""

    args: argparse.Namespace
    folder: Path
    pool: concurrent.futures.Executor
    done: dict[str, dict]
    fixed: str
    corpus: str = ""  # a hash of it

    def scores(self, trials: list[Trial]) -> list[float]:
        """Bits per byte of each."""
        return self.found(trials, "bits_per_byte")

    def found(self, trials: list[Trial], what: str) -> list[float]:
        """What was found under this name in each run."""
        missing = {t.key(self.fixed): t for t in trials if t.key(self.fixed) not in self.done}
        work = {
            self.pool.submit(run_trial, trial, self.args, self.folder): (key, trial)
            for key, trial in missing.items()
        }
        for ended in concurrent.futures.as_completed(work):
            key, trial = work[ended]
            self.done[key] = vars(trial) | {"found": ended.result()}
            self.keep()
            score = self.done[key]["found"]["bits_per_byte"]
            run = f"{trial.tokens:,} tokens, seed {trial.seed}, {trial.recipe}: {trial.flags}"
            print(f"{score:.4f}  {run}", file=sys.stderr)
        return [self.done[t.key(self.fixed)]["found"][what] for t in trials]

    def keep(self) -> None:
        """Write what was found."""
        if self.args.json:
            write_atomically(self.args.json, json.dumps(self.done, indent=1).encode())

    def best(self, name: str, tokens: int) -> Flags:
        """The settings that a sweep of one axis after another leads to, at the first seed."""
        recipe = recipes(self.args.device.startswith("cuda"))[name]
        flags, seed = recipe.flags, self.args.seeds[0]
        for axis, values in list(recipe.axes.items()) * self.args.rounds:
            tried = [flags | {axis: value} for value in dict.fromkeys([flags[axis], *values])]
            scores = self.scores([Trial(name, f, tokens, seed) for f in tried if fits(f)])
            flags = min(zip(scores, filter(fits, tried), strict=True), key=lambda pair: pair[0])[1]
        return flags


def with_ablations(names: list[str]) -> list[str]:
    """These recipes, and each change of ours that is not among them."""
    return [*dict.fromkeys([*names, *(n for n in recipes(False) if n.startswith("ours, "))])]


def fits(flags: Flags) -> bool:
    """Whether the program accepts these; a warm-up and a decay share the run."""
    return flags.get("warmup_ratio", 0) + flags.get("decay_ratio", 0) <= 1


# -------------------------------------------------------------------------------------- results


def share_needed(points: Mapping[int, float], target: float) -> float:
    """The number of tokens at which ours reaches ``target``; inf if it does not.

    Args: points: bits per byte by tokens, of runs to the end of their schedule; between them, along
        a line in the tokens' logarithm. Never fewer than the fewest of them."""
    before: tuple[int, float] | None = None
    for tokens, score in sorted(points.items()):
        if score <= target:
            if before is None:
                return tokens
            part = (before[1] - target) / (before[1] - score)
            return math.exp((1 - part) * math.log(before[0]) + part * math.log(tokens))
        before = tokens, score
    return math.inf


def z_score(ours: list[float], others: list[float]) -> float | None:
    """The difference of means over its standard error; None with fewer than two seeds a side."""
    if min(len(ours), len(others)) < 2:
        return None
    error = statistics.variance(ours) / len(ours) + statistics.variance(others) / len(others)
    return (statistics.mean(others) - statistics.mean(ours)) / math.sqrt(error) if error else None


def spread(values: list[float]) -> str:
    """Mean, and deviation where there are several."""
    if math.inf in values:
        return "over 1"
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def rows_of(contest: Contest, tokens: int, chosen: Mapping[str, Flags]) -> Iterator[str]:
    """The table's lines for this many tokens."""
    seeds = contest.args.seeds

    def scored(name: str, share: float = 1.0) -> list[float]:
        own = [Trial(name, chosen[name], round(tokens * share), seed) for seed in seeds]
        return contest.scores(own)

    by_share: list[dict[int, float]] = [{} for _ in seeds]
    for share in SHARES if "ours" in chosen else ():
        for points, score in zip(by_share, scored("ours", share), strict=True):
            points[round(tokens * share)] = score
    ours = scored("ours") if "ours" in chosen else []
    own_seconds = math.nan
    for name, flags in sorted(chosen.items(), key=lambda item: item[0] != "ours"):
        scores = scored(name)
        target = statistics.mean(scores)
        shares = [share_needed(points, target) / tokens for points in by_share]
        z, needs = z_score(ours, scores), spread(shares)
        if name == "ours" or not ours:
            z, needs = None, ""
        settings = f"{flags.get('learning_rate', 'auto')}, {flags.get('batch_size', 'auto')}"
        trials = [Trial(name, flags, tokens, seed) for seed in seeds]
        seconds = statistics.median(contest.found(trials, "seconds"))
        own_seconds = seconds if name == "ours" else own_seconds  # the first of chosen
        of_time = f"{statistics.mean(shares) * own_seconds / seconds:.2f}" if needs else ""
        yield (
            f"| {tokens:,} | {name} | {settings} | {spread(scores)} | {needs} | {of_time} "
            f"| {'' if z is None else f'{z:.1f}'} | {spread(contest.found(trials, REPEATS))} |"
        )


def make_contest(args: argparse.Namespace, made: Callable[[Contest], None]) -> None:
    """Hand a contest to ``made``; its processes and files last as long."""
    folder = Path(tempfile.mkdtemp())
    digest = hashlib.sha256(args.data_path.read_bytes()).hexdigest()[:16]
    parts = split(args.data_path, folder)
    for part in parts:
        build_token_cache([str(part)], load_tokenizer("model"), folder / "cache")
    fixed = f"{code_digest()} {digest} {args.preset} {args.device.partition(':')[0]}"
    done = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        args.jobs, context, start_worker, (threads,)
    ) as pool:
        made(Contest(args, folder, pool, done, fixed, digest))
    shutil.rmtree(folder)


def nanochat(contest: Contest, tokens: int) -> Iterator[str]:
    """Lines of nanochat, its rates in factors of two; run one after another."""
    args, folder = contest.args, contest.folder
    texts = scored_rows(folder / "kept_aside.jsonl", folder / "cache")[2]
    score = folder / "score.jsonl"
    score.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=args.nanochat, capture_output=True, text=True, check=True
    ).stdout
    decides = f"{commit} {bare(ROOT / 'bench/run_nanochat.py')} {contest.corpus} {args.device}"
    for factor in args.nanochat_factors:
        trial = Trial(f"nanochat, rates x {factor:g}", {}, tokens, args.seeds[0])
        key = trial.key(decides)
        if key not in contest.done:
            command = [args.nanochat_python, ROOT / "bench/run_nanochat.py"]
            command += ["--device", args.device]
            command += ["--checkout", args.nanochat, "--data_path", folder / "train.jsonl"]
            command += ["--score", score, "--folder", folder / "nanochat"]
            command += ["--tokens", tokens, "--rate_factor", factor]
            done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{trial.recipe}: failed, the cause is above")
            found = json.loads(done.stdout.splitlines()[-1])
            contest.done[key] = vars(trial) | {"found": found}
            contest.keep()
        found = contest.done[key]["found"]
        yield f"| {tokens:,} | {trial.recipe} | | {found['bits_per_byte']:.4f} | | | | |"


def main() -> None:
    """Sweep, run, and print the table."""
    names = [*recipes(False)]
    main_names = [name for name in names if not name.startswith("ours, ")]
    cli = parser(__doc__)
    cli.add_argument("--data_path", required=True, type=Path, help="JSONL")
    cli.add_argument("--preset", default="demo")
    cli.add_argument("--tokens", type=int, nargs="+", default=[600_000])
    cli.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    cli.add_argument("--only", nargs="+", choices=names, default=[*main_names])
    cli.add_argument("--ablations", action="store_true", help="and ours with each part left out")
    cli.add_argument("--rounds", type=int, default=1, help="of each sweep; 0: as they begin")
    cli.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    cli.add_argument("--json", type=Path, help="all runs; what it holds is not run again")
    cli.add_argument("--nanochat", type=Path, help="its repository; left out without")
    cli.add_argument("--nanochat_python", default=sys.executable, help="has what it imports")
    cli.add_argument("--nanochat_factors", type=float, nargs="+", default=[5, 10, 20, 40])
    args = cli.parse_args()
    if args.ablations:
        args.only = with_ablations(args.only)

    def made(contest: Contest) -> None:
        lines = [
            "| tokens | recipe | rate, rows | bits/byte | ours needs of its tokens | of its time "
            "| z | repeated 4-grams |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for tokens in args.tokens:
            chosen = {name: contest.best(name, tokens) for name in args.only}
            lines += rows_of(contest, tokens, chosen)
            lines += nanochat(contest, tokens) if args.nanochat else ()
            lines += [f"<!-- {tokens:,}: {name}: {flags} -->" for name, flags in chosen.items()]
        print(surroundings(args, "bench.compare_recipes"), *lines, sep="\n")

    make_contest(args, made)


if __name__ == "__main__":
    main()
