"""Draw what runs reported: loss, held-out bits per byte, rate, gradient norm, tokens a second.

    python -m scripts.plot out/pretrain_768_metrics.jsonl                # -> out/pretrain_768.png
    python -m scripts.plot a_metrics.jsonl b_metrics.jsonl --output both.png
    python -m scripts.plot out/pretrain_256_metrics.jsonl --band docs/bands/demo.json
    python -m scripts.plot seed_*_metrics.jsonl --write_band docs/bands/demo.json

A band is where the losses of runs with one recipe and several seeds lie; with --band it is told
whether a run stays inside: is its loss right? Needs matplotlib, but for the bands alone.
"""

import argparse
import bisect
import json
import math
import sys
from pathlib import Path
from typing import Any

PANELS = {  # a record's key -> the panel's title
    "loss": "training loss (nats a token)",
    "heldout_bits_per_byte": "held out (bits a byte)",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "useful tokens a second",
}
IN_A_BAND = ("loss", "heldout_bits_per_byte")
Band = dict[str, list[list[float]]]  # key -> [update, lowest, highest] each


class PlotError(Exception):
    """Something that the person can mend; its text is the whole message."""


def read(path: Path) -> list[dict]:
    """A run's records. Raises: PlotError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records: list[Any] = [json.loads(line) for line in lines]
    except ValueError:
        records = [None]  # which the check of each record finds
    if not all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in records):
        raise PlotError(f"{path}: expected the metrics of a run, one JSON object a line with a "
                        f"step; they are in its --save_dir, <name>_metrics.jsonl")
    if not any("tokens" in record for record in records):
        raise PlotError(f"{path}: holds no log line yet")
    return records


def curve(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Tokens seen, and the values reported there; an evaluation takes the log line's before it."""
    logged = [(r["step"], r["tokens"]) for r in records if "tokens" in r]
    tokens, values = [], []
    for record in records:
        if key in record:
            last = bisect.bisect_right(logged, (record["step"], float("inf"))) - 1
            tokens.append(logged[last][1] if last >= 0 else 0)
            values.append(record[key])
    return tokens, values


def by_update(records: list[dict], key: str) -> dict[int, float]:
    """What was reported after each update; the newest, if a run went back."""
    return {r["step"]: r[key] for r in records if key in r}


def band_of(runs: list[list[dict]]) -> Band:
    """From lowest to highest over the runs, and as much again on both sides: there are few runs."""
    band = {}
    for key in IN_A_BAND:
        scores = [by_update(records, key) for records in runs]
        band[key] = []
        for step in sorted(set.intersection(*map(set, scores))):
            low, high = min(s[step] for s in scores), max(s[step] for s in scores)
            spread = high - low
            band[key].append([step, round(low - spread, 4), round(high + spread, 4)])
    return band


def compare(records: list[dict], band: Band) -> list[str]:
    """Whether a run's losses lie in the band, in words."""
    lines = []
    for key, bounds in band.items():
        scores = by_update(records, key)
        both = [(step, low, scores[step], high) for step, low, high in bounds if step in scores]
        outside = [x for x in both if not x[1] <= x[2] <= x[3]]
        text = f"{PANELS[key]}: {len(both) - len(outside)} of {len(both)} points lie in the band"
        if not both:
            text = f"{PANELS[key]}: no update of the band was reported, see its recipe"
        if outside:
            step, low, score, high = outside[0]
            text += f"; the first outside: update {step:,}, {score:.4f}, band {low} to {high}"
        lines.append(text)
    return lines


def draw(runs: dict[str, list[dict]], band: Band) -> Any:
    """One panel a quantity, one line a run. Returns: matplotlib's figure.

    Raises: PlotError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # a file; no window
    from matplotlib import pyplot

    shown = [key for key in PANELS if any(curve(records, key)[1] for records in runs.values())]
    columns = min(3, len(shown))
    figure = pyplot.figure(
        figsize=(4 * columns, 3 * math.ceil(len(shown) / columns)), layout="constrained"
    )
    for number, key in enumerate(shown, start=1):
        panel = figure.add_subplot(math.ceil(len(shown) / columns), columns, number)
        for name, records in runs.items():
            tokens, values = curve(records, key)
            panel.plot(tokens, values, label=name, linewidth=1.2,
                       marker="." if len(values) < 20 else None)
        panel.set_title(PANELS[key], fontsize=10)
        panel.set_xlabel("tokens seen")
        panel.grid(alpha=0.3)
        if band.get(key):
            first = next(iter(runs.values()))
            at = dict(zip(by_update(first, key), curve(first, key)[0], strict=False))
            points = [(at[step], low, high) for step, low, high in band[key] if step in at]
            if points:
                seen, low, high = zip(*points, strict=True)
                panel.fill_between(seen, low, high, alpha=0.25, label="band")
        if key == "loss" and (len(runs) > 1 or band):
            panel.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", type=Path, help="<save_dir>/*_metrics.jsonl")
    parser.add_argument("--output", type=Path, help="PNG; None: beside the first metrics")
    parser.add_argument("--band", type=Path, help="of --write_band: is the loss right?")
    parser.add_argument("--write_band", type=Path, help="from these runs; nothing is drawn")
    args = parser.parse_args(argv)
    try:
        runs = {path.stem.removesuffix("_metrics"): read(path) for path in args.metrics}
        if len(runs) < len(args.metrics):  # of one name in several folders
            runs = {str(path): read(path) for path in args.metrics}
        if args.write_band:
            text = json.dumps(band_of(list(runs.values())))
            args.write_band.write_text(text.replace("]], ", "]],\n").replace("], [", "],\n  ["))
            return 0
        band = json.loads(args.band.read_text()) if args.band else {}
        for name, records in runs.items():
            for line in compare(records, band):
                print(f"{name}: {line}")
        first = args.metrics[0]
        output = args.output or first.with_name(first.stem.removesuffix("_metrics") + ".png")
        draw(runs, band).savefig(output, dpi=110)
        print(f"drawn: {output}")
    except (PlotError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
