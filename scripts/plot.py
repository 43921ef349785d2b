"""Plot the metrics of runs: loss, held-out bits per byte and their forecast, learning rate, speed.

    python -m scripts.plot out/pretrain_768_metrics.jsonl                # -> out/pretrain_768.png
    python -m scripts.plot a_metrics.jsonl b_metrics.jsonl --output both.png
    python -m scripts.plot out/pretrain_256_metrics.jsonl --band docs/bands/demo.json
    python -m scripts.plot seed_*_metrics.jsonl --write_band docs/bands/demo.json

A band is the range of losses that one recipe gives with different seeds. With --band, the program
reports whether a run stays inside, that is, whether its loss is right. Plots need matplotlib.
"""

import argparse
import bisect
import json
import math
import sys
from pathlib import Path
from typing import Any

PANELS = {  # key of a record: title of its panel
    "loss": "training loss (nats per token)",
    "heldout_bits_per_byte": "held-out loss (bits per byte)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second, without padding",
    "repeated_4grams": "repeated 4-grams in continuations (share)",
    "heldout_accuracy": "held-out accuracy (share of pairs)",
    "heldout_margin": "held-out margin (beta * nats)",
}
BAND_KEYS = ("loss", "heldout_bits_per_byte")
Band = dict[str, list[list[float]]]  # for each key, [update, lowest, highest] of each update


class PlotError(Exception):
    """An error that the user can fix; its text is the whole message."""


def read(path: Path) -> list[dict]:
    """The records of a metrics file. Raises: PlotError if it is not one, or has no log line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records: list[Any] = [json.loads(line) for line in lines]
    except ValueError:
        records = [None]  # reported below
    if not all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in records):
        raise PlotError(
            f"{path}: expected the metrics of a run, with one JSON object per line and a step in "
            f"each; they are in its --save_dir, as <name>_metrics.jsonl"
        )
    records = [with_tokens(record) for record in records]
    if not any("tokens" in record for record in records):
        raise PlotError(f"{path}: contains no log line yet")
    return records


def with_tokens(record: dict) -> dict:
    """A record of train_dpo.py, which counts pairs, under the names of the others, too."""
    named = {"tokens": "pairs", "tokens_per_second": "pairs_per_second"}
    return record | {name: record[own] for name, own in named.items() if own in record}


def curve(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Numbers of tokens seen, and the values of ``key`` there.

    An evaluation does not report its tokens; those of the last log line before it are used."""
    logged = [(r["step"], r["tokens"]) for r in records if "tokens" in r]
    tokens, values = [], []
    for record in records:
        if key in record:
            last = bisect.bisect_right(logged, (record["step"], float("inf"))) - 1
            tokens.append(logged[last][1] if last >= 0 else 0)
            values.append(record[key])
    return tokens, values


def by_update(records: list[dict], key: str) -> dict[int, float]:
    """The values of ``key`` by update; the last one where an update was run again."""
    return {r["step"]: r[key] for r in records if key in r}


def band_of(runs: list[list[dict]]) -> Band:
    """The range over the runs, with its width added on both sides because runs are few."""
    band = {}
    for key in BAND_KEYS:
        scores = [by_update(records, key) for records in runs]
        band[key] = []
        for step in sorted(set.intersection(*map(set, scores))):
            low, high = min(s[step] for s in scores), max(s[step] for s in scores)
            spread = high - low
            band[key].append([step, round(low - spread, 4), round(high + spread, 4)])
    return band


def compare(records: list[dict], band: Band) -> list[str]:
    """One line per key of the band: how many points of the run lie in it."""
    lines = []
    for key, bounds in band.items():
        scores = by_update(records, key)
        both = [(step, low, scores[step], high) for step, low, high in bounds if step in scores]
        outside = [x for x in both if not x[1] <= x[2] <= x[3]]
        text = f"{PANELS[key]}: {len(both) - len(outside)} of {len(both)} points lie in the band"
        if not both:
            text = f"{PANELS[key]}: the run reported no update of the band, see its recipe"
        if outside:
            step, low, score, high = outside[0]
            text += f"; the first outside: {score:.4f} at update {step:,}, band {low} to {high}"
        lines.append(text)
    return lines


def draw(runs: dict[str, list[dict]], band: Band) -> Any:
    """One panel per quantity, with one line per run. Returns: a matplotlib figure.

    Raises: PlotError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # writes files and opens no window
    from matplotlib import pyplot

    of_pairs = any("pairs" in record for records in runs.values() for record in records)
    shown = [key for key in PANELS if any(curve(records, key)[1] for records in runs.values())]
    columns = min(3, len(shown))
    figure = pyplot.figure(
        figsize=(4 * columns, 3 * math.ceil(len(shown) / columns)), layout="constrained"
    )
    for number, key in enumerate(shown, start=1):
        panel = figure.add_subplot(math.ceil(len(shown) / columns), columns, number)
        for name, records in runs.items():
            tokens, values = curve(records, key)
            panel.plot(
                tokens, values, label=name, linewidth=1.2, marker="." if len(values) < 20 else None
            )
            expected = curve(records, "forecast_expected")
            if key == "heldout_bits_per_byte" and expected[0]:
                low, high = (curve(records, f"forecast_{end}")[1] for end in ("low", "high"))
                color = panel.lines[-1].get_color()
                panel.plot(*expected, color=color, linestyle=":", label="forecast of the end")
                panel.fill_between(expected[0], low, high, color=color, alpha=0.12)
        title = PANELS[key].replace("token", "pair") if of_pairs else PANELS[key]
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("pairs seen" if of_pairs else "tokens seen")
        panel.grid(alpha=0.3)
        if band.get(key):
            first = next(iter(runs.values()))
            at = dict(zip(by_update(first, key), curve(first, key)[0], strict=False))
            points = [(at[step], low, high) for step, low, high in band[key] if step in at]
            if points:
                seen, low, high = zip(*points, strict=True)
                panel.fill_between(seen, low, high, alpha=0.25, label="band")
        several = key == "loss" and (len(runs) > 1 or band)
        if several or any(line.get_linestyle() == ":" for line in panel.lines):
            panel.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", type=Path, help="<save_dir>/*_metrics.jsonl")
    parser.add_argument("--output", type=Path, help="PNG file; default: beside the first metrics")
    parser.add_argument("--band", type=Path, help="file of --write_band to compare the runs with")
    parser.add_argument("--write_band", type=Path, help="write the band of these runs; no plot")
    args = parser.parse_args(argv)
    try:
        runs = {path.stem.removesuffix("_metrics"): read(path) for path in args.metrics}
        if len(runs) < len(args.metrics):  # the same name in several folders
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
        print(f"plot written to {output}")
    except (PlotError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
