"""Runs made to fit the forecast of the final loss, and others to see whether it holds.

    python -m bench.forecast_runs --data_path corpus.jsonl --json runs.json
    python -m bench.forecast_runs --json runs.json                # runs that were made; no new ones

Each run is the real program, in a process of its own. Every second run is kept apart. The others
give the priors in trainer/forecast.py, which are printed; those kept apart tell how far the
forecasts were off, and how many runs ended within the range. --json keeps the runs' losses; of
other runs, with --recipe best, --ends has the ends alone, for the law that goes by counts of pairs.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measuring import ROOT, parser, surroundings, words
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import forecast
from trainer.auto import weights_in_layers
from trainer.checkpoint import write_atomically

LENGTH, BYTES_A_TOKEN, HELD_OUT = 340, 3.4, 0.08
EVALUATIONS, SCORED = 20, 16_000  # of a run; tokens
KINDS = ("held_out", "training")
SHARES = (forecast.EARLIEST, 0.3, 0.5, 0.8)  # of the run, from which on forecasts are looked at
BEST = {"recipe": "best"}
SHORT_UPDATES = {"batch_size": 6, "learning_rate": 5e-3}  # and the demo's Muon and wsd
ADAMW = {"optimizer": "adamw", "lr_schedule": "cosine", "learning_rate": 2e-3, "warmup_ratio": 0.05}
RECIPES: dict[str, dict[str, Any]] = {
    "best": BEST,
    "muon": SHORT_UPDATES,
    "muon, late decay": SHORT_UPDATES | {"decay_ratio": 0.4},
    "adamw": ADAMW | {"batch_size": 8},
}
WIDTHS_AND_TOKENS = ((64, 300_000), (64, 1_000_000), (128, 600_000), (256, 500_000))


def settings(corpus: Path) -> Iterator[dict[str, Any]]:
    """Flags of each run, by its number; the demo's own sample is the last of the texts."""
    for recipe in RECIPES.values():
        for seed, (width, tokens) in enumerate(WIDTHS_AND_TOKENS * 2):
            for text in (corpus, ROOT / "dataset" / "pretrain_sample.jsonl"):
                yield recipe | {"hidden_size": width, "seed": seed, "tokens": tokens, "text": text}


def make(flags: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run. Returns: its schedule, and its losses by the share of the run that was done."""
    tokens, text = flags.pop("tokens"), Path(flags.pop("text"))
    lines, size = [], 0
    for line in text.read_bytes().splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size > tokens * BYTES_A_TOKEN * (1 + HELD_OUT):
            break
    data = folder / "data.jsonl"
    data.write_bytes(b"".join(lines))
    rows = flags.get("batch_size") or max(1, round(0.58 * tokens**0.571 / LENGTH))
    updates = tokens / LENGTH / rows
    given = {
        "preset": "demo",
        "device": "cpu",
        "epochs": 1,
        "data_path": data,
        "max_seq_len": LENGTH,
        "heldout_fraction": HELD_OUT,
        "eval_tokens": SCORED,
        "eval_interval": max(1, int(updates / EVALUATIONS)),
        "log_interval": max(1, int(updates / EVALUATIONS / 2)),
        "save_interval": 10**9,
        "save_dir": folder / "out",
        "checkpoint_dir": folder / "checkpoints",
        "cache_dir": folder / "cache",
    }
    command = [sys.executable, "train_pretrain.py", *words(given | flags)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (metrics,) = (folder / "out").glob("*_metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    (summary,) = (folder / "out").glob("*.json")
    described = json.loads(summary.read_text())
    found = described["run"]["settings"]
    schedule = [found["lr_schedule"], found["warmup_ratio"], found["decay_ratio"]]
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**described["config"]))
    pairs = [record[forecast.PAIRS] for record in records if forecast.PAIRS in record]
    held_out, training = forecast.losses_of(records, math.inf)
    return {
        "flags": flags | {"tokens": tokens, "text": text.stem},
        "schedule": schedule,
        "pairs": round(pairs[0], 4) if pairs else None,
        "tokens": described["run"]["tokens"],
        "weights": weights_in_layers(model),
        "held_out": [(share, round(score, 4)) for share, score in held_out],
        "training": [(share, round(loss, 3)) for share, loss in training],
    }


def apart(runs: list[dict]) -> list[dict]:
    """Those that the priors are not fitted to."""
    return [run for run in runs if run["apart"]]


def kind_of(run: dict) -> str:
    """Which prior is fitted to this run."""
    start = "counts" if run["flags"].get("recipe") == "best" else "random"
    return f"{start}, {'sample' if 'sample' in run['flags']['text'] else 'text'}"


def coefficients(run: dict) -> torch.Tensor:
    """(2,) a and b of the law, by least squares over what comes after EARLIEST."""
    x, y = zip(*forecast.used(run["held_out"], forecast.EARLIEST), strict=True)
    law = torch.tensor(forecast.law_of(forecast.rate_of(*run["schedule"]), x))
    with_height = torch.cat((torch.ones(len(x), 1), law), 1).double()
    return torch.linalg.lstsq(with_height, torch.tensor(y).double().log()[:, None]).solution[1:, 0]


def priors(runs: list[dict]) -> Iterator[str]:
    """A line for each kind of run: the numbers in trainer/forecast.py."""
    for kind in sorted({kind_of(run) for run in runs}):
        found = torch.stack([coefficients(run) for run in runs if kind_of(run) == kind])
        mean, spread = found.mean(0).tolist(), torch.atleast_2d(found.T.cov()).tolist()
        numbers = (*mean, spread[0][0], spread[0][1], spread[1][1])
        yield f"{kind}, {len(found)} runs: Prior({', '.join(f'{n:.3g}' for n in numbers)})"


def below_pairs(ends: list[dict]) -> Iterator[str]:
    """BELOW_PAIRS in trainer/forecast.py, by least squares, and what these leave over."""
    if len(ends) <= len(forecast.BELOW_PAIRS):
        return
    x = torch.tensor([forecast.features_of(end["tokens"], end["weights"]) for end in ends]).double()
    y = torch.tensor([math.log(end["end"] / end["pairs"]) for end in ends]).double()
    found = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    deviation = ((y - x @ found).square().sum() / (len(y) - len(found))).sqrt().item()
    numbers = ", ".join(f"{n:.4f}" for n in found.tolist())
    yield f"below pairs, {len(ends)} runs: ({numbers}), deviation {deviation:.4f}"


def ends_of(runs: list[dict]) -> list[dict]:
    """Of runs of ordinary text that began with counts."""
    chosen = [run for run in runs if run.get("pairs") and kind_of(run) == "counts, text"]
    return [run | {"end": run["held_out"][-1][1]} for run in chosen]


def errors(run: dict, share: float) -> tuple[float, bool] | None:
    """How far the forecast of the first evaluation from this share of the run on was off, relative,
    and whether its range held the truth."""
    seen = min(p[0] for p in run["held_out"] if p[0] >= share)
    held_out, training = ([p for p in run[kind] if p[0] <= seen] for kind in KINDS)
    counts = kind_of(run).startswith("counts")
    rate = forecast.rate_of(*run["schedule"])
    known = forecast.priors_for(not counts)
    # The last training loss is a mean that reaches beyond this share.
    pairs = run.get("pairs") and [run[k] for k in ("pairs", "tokens", "weights")]
    by_pairs = forecast.forecast_by_pairs(*pairs) if pairs else None
    found = forecast.forecast(held_out, [] if counts else training[:-1], rate, known, by_pairs)
    truth = run["held_out"][-1][1]
    return None if found is None else (found.expected / truth - 1, found.low <= truth <= found.high)


def table(runs: list[dict]) -> Iterator[str]:
    """Markdown: by kind of run and share."""
    yield "| start, text | from | runs | off by, median | at most | within the range |"
    yield "|---|---|---|---|---|---|"
    for kind in sorted({kind_of(run) for run in runs}):
        for share in SHARES:
            found = [errors(run, share) for run in runs if kind_of(run) == kind]
            known = [pair for pair in found if pair]
            if known:
                off = [abs(pair[0]) for pair in known]
                yield (
                    f"| {kind} | {share:.0%} | {len(known)} | {statistics.median(off):.1%} "
                    f"| {max(off):.1%} | {sum(pair[1] for pair in known)} |"
                )


def main() -> None:
    """Make the runs that are missing, and print priors and table."""
    cli = parser(__doc__)
    cli.add_argument("--data_path", type=Path, help="JSONL; without, no new runs are made")
    cli.add_argument("--json", type=Path, required=True, help="the runs' losses")
    cli.add_argument("--ends", type=Path, help="JSON of the ends of other runs")
    args: argparse.Namespace = cli.parse_args()
    runs = json.loads(args.json.read_text()) if args.json.exists() else []
    for flags in list(settings(args.data_path))[len(runs) :] if args.data_path else ():
        with tempfile.TemporaryDirectory() as folder:
            runs.append(make(flags, Path(folder)) | {"apart": bool(len(runs) % 2)})
        lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
        write_atomically(args.json, f"[{lines}]\n".encode())
    print(surroundings(args, "bench.forecast_runs"))
    fitted = [run for run in runs if not run["apart"]]
    ends = ends_of(fitted) + (json.loads(args.ends.read_text()) if args.ends else [])
    print("", *priors(fitted), *below_pairs(ends), "", *table(apart(runs)), sep="\n")


if __name__ == "__main__":
    main()
