"""Does a small change of the recipe pay? The same documents, updates and seeds with and without it.

    python -m bench.try_variants --data_path corpus.jsonl --documents 1600 --seeds 1 2 3
    python -m bench.try_variants --data_path corpus.jsonl --variants "--lr 1e-2" "z-loss 1e-4"

A run sees a fixed number of updates, not of minutes, so that on one machine its result is the same
to the last bit, however busy that machine is. What was tried and lost stays here as a few lines, so
that it can be tried again at another size.
"""

import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from torch import Tensor, nn

from bench.measuring import (
    OURS,
    NoGuard,
    built_with,
    drawn_outputs,
    is_output,
    parser,
    redraw,
    reports,
    surroundings,
    train,
    words,
)
from model.model_minimind import IGNORE, next_token_nats, shifted
from trainer.run import Run

RECIPE = (
    "--preset demo --max_seq_len 340 --batch_size 8 --accumulation_steps 1 --epochs 1 "
    "--optimizer muon --lr_schedule wsd --warmup_ratio 0 --decay_ratio 0.6 --learning_rate 8e-3 "
    "--heldout_fraction 0.3 --eval_tokens 131072"
)
AS_IT_IS = "as it is"


def smaller_outputs(name: str, parameter: nn.Parameter, num_layers: int) -> None:
    """As GPT-2 (Radford et al. 2019), section 2.3: two of them in each layer add up."""
    if is_output(name):
        nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers))


def by_width(name: str, parameter: nn.Parameter, num_layers: int) -> None:
    """Layers' other matrices keep the size of what they multiply: deviation 1 / sqrt(columns)."""
    if ".layers." in name and parameter.ndim >= 2 and not is_output(name):
        nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))


def plain_embedding(name: str, parameter: nn.Parameter, num_layers: int) -> None:
    """Embeddings with one deviation at any width."""
    if "embed_tokens" in name:
        nn.init.normal_(parameter, std=0.02)


class ZLoss(nn.Module):
    """Draws the logarithm of the softmax's sum towards zero; in training alone, so that held-out
    losses compare. Source: PaLM (Chowdhery et al. 2022), section 5."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Shapes and result as in ``next_token_nats``."""
        nats = next_token_nats(logits, labels)
        if not self.training:
            return nats
        log_z = logits.float().logsumexp(-1)  # (B, T)
        return nats + self.weight * (log_z.square() * (shifted(labels) != IGNORE)).sum()


def z_loss(weight: float, run: Run) -> None:
    """Train with a z-loss of this weight."""
    run.model.next_token_nats = ZLoss(weight)


# What a variant changes in the run that was built; variants by flags alone need no entry.
CHANGES: dict[str, Callable[[Run], None]] = {
    "outputs drawn": partial(redraw, drawn_outputs),
    "outputs / sqrt(2 layers)": partial(redraw, smaller_outputs),
    "deviation by width": partial(redraw, by_width),
    "embedding 0.02": partial(redraw, plain_embedding),
    "z-loss 1e-4": partial(z_loss, 1e-4),
}
VARIANTS = [*CHANGES, "--grad_clip inf", "--grad_clip 0.3"]


def flags_of(variant: str) -> list[str]:
    """A name that begins with dashes is a variant by flags alone."""
    return shlex.split(variant) if variant.startswith("--") else []


def child(pipe: Connection, variant: str, flags: list[str]) -> None:
    """Train one variant; send the updates made and the held-out bits per byte at the end."""
    changes, guard = [CHANGES[variant]] if variant in CHANGES else [], NoGuard()
    train([*flags, *flags_of(variant)], guard, OURS._replace(build_run=built_with(*changes)))
    score = guard.run.latest["heldout_bits_per_byte"]
    pipe.send({"updates": guard.run.step, "bits_per_byte": score})


def trial(variant: str, seed: int, corpus: Path, recipe: list[str]) -> dict:
    """One run in a process of its own, and what came out of it."""
    name = f"{variant}, seed {seed}"
    with tempfile.TemporaryDirectory() as folder:
        flags = recipe + words(
            {
                "data_path": corpus,
                "cache_dir": corpus.parent / "cache",
                "save_dir": folder,
                "seed": seed,
                "eval_interval": 10**9,
            }
        )
        (found,) = reports(name, child, variant, flags)
    print(
        f"{name}: {found['updates']} updates, {found['bits_per_byte']:.4f} bits/byte",
        file=sys.stderr,
    )
    return {"variant": variant, "seed": seed, **found}


def report(trials: list[dict]) -> str:
    """Markdown: each variant's seeds, and by how much it is better or worse than none."""
    by_variant: dict[str, dict[int, float]] = {}
    for t in trials:
        by_variant.setdefault(t["variant"], {})[t["seed"]] = t["bits_per_byte"]
    base = by_variant[AS_IT_IS]
    lines = [
        "| variant | bits/byte, seeds | against as it is: mean | lowest to highest |",
        "|---|---|---|---|",
    ]
    for variant, scores in by_variant.items():
        gaps = [score - base[seed] for seed, score in scores.items()]
        lines.append(
            f"| {variant} | {', '.join(f'{s:.4f}' for s in scores.values())} "
            f"| {statistics.mean(gaps):+.4f} | {min(gaps):+.4f} to {max(gaps):+.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train all variants with all seeds, and print the table."""
    cli = parser(__doc__)
    cli.add_argument("--data_path", required=True, type=Path, help="JSONL")
    cli.add_argument("--documents", type=int, default=1600, help="of it, at equal distances")
    cli.add_argument(
        "--variants", nargs="+", default=VARIANTS, metavar="NAME", help="names, or flags in quotes"
    )
    cli.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    cli.add_argument("--recipe", default=RECIPE, help="flags of every run")
    args = cli.parse_args()
    for variant in args.variants:
        if variant not in CHANGES and not flags_of(variant):
            cli.error(f"--variants {variant}: expected flags, or one of {', '.join(CHANGES)}")
    lines = args.data_path.read_bytes().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_bytes(b"".join(lines[:: max(1, len(lines) // args.documents)]))
        variants = dict.fromkeys([AS_IT_IS, *args.variants])
        recipe = [*shlex.split(args.recipe), "--device", args.device]
        trials = [trial(v, s, corpus, recipe) for s in args.seeds for v in variants]
    print(surroundings(args, "bench.try_variants"))
    print(f"\n{trials[0]['updates']} updates each: {args.recipe}\n\n{report(trials)}")


if __name__ == "__main__":
    main()
