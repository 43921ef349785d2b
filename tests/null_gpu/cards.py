"""What small and older cards would do: micro-batch, path and memory, as the program chooses them.

    python -m tests.null_gpu.cards FOLDER      # FOLDER: prepared by build.py; prints a table

Each line is a --dry_run of the real program on a null GPU with that card's numbers. Memory is what
PyTorch's allocator was asked for; what kernels themselves need, and speed, only a card can tell.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.null_gpu.build import environment

ROOT = Path(__file__).resolve().parents[2]
CARDS = [("t4", ""), ("2080ti", ""), ("3090", "8"), ("3090", "12"), ("4090", "16"), ("3090", "")]
CARDS += [("4090", ""), ("a100", ""), ("h100", "")]
NAMES = {("3090", "8"): "8 GB (as RTX 3070)", ("3090", "12"): "12 GB (as RTX 3060)"}
NAMES |= {("4090", "16"): "16 GB (as RTX 4080)"}


def dry_run(folder: Path, card: str, gib: str, preset: str, place: Path) -> str:
    """One line of the table."""
    env = environment(folder, card)
    if gib:
        env["NULL_GPU_GIB"] = gib
    report = place / "report.json"
    words = [f"{folder}/venv/bin/python", "-m", "tests.null_gpu.run", str(report), "train_pretrain"]
    words += ["--preset", preset, "--dry_run", "1", "--use_compile", "0", "--cache_dir"]
    words += [str(place), "--data_path", str(place / "text.jsonl")]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    name = NAMES.get((card, gib), card.upper())
    if done.returncode:
        return f"| {name} | {preset} | failed: {done.stderr.strip().splitlines()[-1]} | | | |"
    found = re.search(r"pass: (\d+) rows, (\d+) passes .* attention (.*?), ", done.stdout)
    dtype = re.search(r"on 1 x cuda, (\w+)", done.stdout)
    assert found and dtype, done.stdout
    peak = json.loads(report.read_text())["peak_bytes"] / 2**30
    return f"| {name} | {preset} | {dtype[1]} | {found[1]} x {found[2]} | {found[3]} | {peak:.1f} |"


def main() -> None:
    """Print the table."""
    print("| card | preset | dtype | rows x passes | attention | peak GiB, eager |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        texts = (json.dumps({"text": f"{i} " + "and one more word " * 90}) for i in range(9_000))
        Path(place, "text.jsonl").write_text("\n".join(texts))
        for preset in ("64m", "moe"):
            for card, gib in CARDS:
                if preset == "moe" and card in ("t4", "2080ti"):
                    continue  # experts in float16 ask the device for sizes, which a null GPU lacks
                print(dry_run(Path(sys.argv[1]), card, gib, preset, Path(place)), flush=True)


if __name__ == "__main__":
    main()
