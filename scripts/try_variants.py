"""Does a small change of the recipe pay? The same documents, updates and seeds with and without it.

    python scripts/try_variants.py --data_path corpus.jsonl --documents 1600 --seeds 1 2 3
    python scripts/try_variants.py --data_path corpus.jsonl --variants "--lr 1e-2" "z-loss 1e-4"

A run sees a fixed number of updates, not of minutes, so that on one machine its result is the same
to the last bit, however busy that machine is. What was tried and lost stays here as a few lines, so
that it can be tried again at another size.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # python puts scripts/ there, as it is this file's folder

import train_pretrain  # noqa: E402
from model import model_minimind  # noqa: E402
from scripts.measuring import (  # noqa: E402
    drawn_outputs, initialised, is_output, surroundings
)
from trainer.device import default_device  # noqa: E402

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


def z_loss(weight: float) -> None:
    """Draw the logarithm of the softmax's sum towards zero, as PaLM (Chowdhery et al. 2022), 5."""
    nats = model_minimind.next_token_nats

    def with_z(logits: Tensor, labels: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():  # held-out loss stays what it is
            return nats(logits, labels)
        log_z = logits.float().logsumexp(-1)
        real = model_minimind.shifted(labels) != model_minimind.IGNORE
        return nats(logits, labels) + weight * (log_z.square() * real).sum()

    model_minimind.next_token_nats = with_z


VARIANTS: dict[str, Callable[[], None]] = {
    AS_IT_IS: lambda: None,
    "outputs drawn": lambda: initialised(drawn_outputs),
    "outputs / sqrt(2 layers)": lambda: initialised(smaller_outputs),
    "deviation by width": lambda: initialised(by_width),
    "--grad_clip inf": lambda: None,
    "--grad_clip 0.3": lambda: None,
    "z-loss 1e-4": lambda: z_loss(1e-4),
}


def flags_of(variant: str) -> list[str]:
    """A name that begins with dashes is a variant by flags alone."""
    return shlex.split(variant) if variant.startswith("--") else []


def child(variant: str, argv: list[str]) -> None:
    """Change the program, and run it."""
    VARIANTS.get(variant, lambda: None)()
    with contextlib.redirect_stdout(io.StringIO()):
        status = train_pretrain.main(argv)
    sys.exit(status)


def trial(variant: str, seed: int, corpus: Path, recipe: list[str]) -> dict:
    """Held-out bits per byte at the end, and the updates made."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            *recipe, *flags_of(variant), "--data_path", str(corpus), "--seed", str(seed),
            "--save_dir", folder, "--checkpoint_dir", folder, "--save_interval", str(10**9),
            "--cache_dir", str(corpus.parent / "cache"), "--eval_interval", str(10**9),
        ]
        process = multiprocessing.get_context("spawn").Process(target=child, args=(variant, argv))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{variant}, seed {seed}: failed, the cause is above")
        (metrics,) = Path(folder).glob("*_metrics.jsonl")
        last = json.loads(metrics.read_text().splitlines()[-1])
    found = {"updates": last["step"], "bits_per_byte": last["heldout_bits_per_byte"]}
    print(f"{variant}, seed {seed}: {found['updates']} updates, {found['bits_per_byte']:.4f} "
          f"bits/byte", file=sys.stderr)
    return {"variant": variant, "seed": seed, **found}


def report(trials: list[dict]) -> str:
    """Markdown: each variant's seeds, and by how much it is better or worse than none."""
    by_variant: dict[str, dict[int, float]] = {}
    for t in trials:
        by_variant.setdefault(t["variant"], {})[t["seed"]] = t["bits_per_byte"]
    base = by_variant[AS_IT_IS]
    lines = ["| variant | bits/byte, seeds | against as it is: mean | lowest to highest |",
             "|---|---|---|---|"]
    for variant, scores in by_variant.items():
        gaps = [score - base[seed] for seed, score in scores.items()]
        lines.append(
            f"| {variant} | {', '.join(f'{s:.4f}' for s in scores.values())} "
            f"| {statistics.mean(gaps):+.4f} | {min(gaps):+.4f} to {max(gaps):+.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train all variants with all seeds, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", required=True, type=Path, help="JSONL")
    parser.add_argument("--documents", type=int, default=1600, help="of it, at equal distances")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], metavar="NAME",
                        help=f"{', '.join(VARIANTS)}; or flags in quotes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--device", default=default_device(), help="cuda, mps or cpu")
    parser.add_argument("--recipe", default=RECIPE, help="flags of every run")
    args = parser.parse_args()
    for variant in args.variants:
        if variant not in VARIANTS and not flags_of(variant):
            parser.error(f"--variants {variant}: expected flags, or one of {', '.join(VARIANTS)}")
    lines = args.data_path.read_bytes().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_bytes(b"".join(lines[:: max(1, len(lines) // args.documents)]))
        variants = dict.fromkeys([AS_IT_IS, *args.variants])
        recipe = [*shlex.split(args.recipe), "--device", args.device]
        trials = [trial(v, s, corpus, recipe)
                  for s in args.seeds for v in variants]
    print(surroundings(args, "scripts/try_variants.py"))
    print(f"\n{trials[0]['updates']} updates each: {args.recipe}\n\n{report(trials)}")


if __name__ == "__main__":
    main()
