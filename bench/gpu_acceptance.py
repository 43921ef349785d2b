"""The first minutes on a card: everything that only a GPU can show, in one report.

    python -m bench.gpu_acceptance                      # eight minutes; writes gpu_report.md, .json
    python -m bench.gpu_acceptance --data_path my.jsonl --minutes 2

Each part is a process of its own with a time limit, so one that fails or hangs costs the report
nothing but itself, and the report says which. Needs torch, transformers and tqdm; pytest for the
tests.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measuring import NoGuard, Parts, parser, surroundings, train
from dataset.lm_dataset import Batch
from trainer.flags import PRESETS
from trainer.progress import Outcome
from trainer.run import Run

# Nanoseconds a token of the 64 M model on one H100, predicted from counted traffic and products;
# docs/BENCHMARKS.md has the count. The names of operations and kernels tell the groups apart.
PREDICTED = {
    "products of attention": 168,
    "products of feed-forward": 420,
    "products of the head": 43,
    "attention": 120,
    "fused elementwise": 334,
    "optimizer and clipping": 7,
    "everything else": 17,
}
PRODUCTS = [group for group in PREDICTED if group.startswith("products")]
UPDATES_BEFORE_PROFILE = 4


class Failed(RuntimeError):
    """A part did not come to its end."""


@dataclass
class Acceptance:
    """The report, while it is made."""

    args: argparse.Namespace
    folder: Path
    began: float = field(default_factory=time.monotonic)
    pages: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the report is due."""
        return 60 * self.args.budget_minutes - (time.monotonic() - self.began)

    def run(self, words: list[str], limit: float) -> str:
        """Run a Python command. Returns: what it printed. Raises: Failed with its last lines."""
        limit = max(1.0, min(limit, self.left()))
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its children end with it
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise Failed(f"took more than {limit:.0f} s; the end:\n{last_lines(output)}") from None
        if process.returncode:
            raise Failed(f"exit status {process.returncode}; the end:\n{last_lines(output)}")
        return output

    def train(self, name: str, limit: float, flags: str, fresh: bool = True) -> str:
        """Train, in files of its own. Returns: what it printed."""
        words = ["train_pretrain.py", "--device", self.args.device, *flags.split()]
        words += ["--save_dir", str(self.folder / name), "--cache_dir", str(self.folder / "cache")]
        words += ["--checkpoint_dir", str(self.folder / f"{name}_states"), *self.data()]
        return self.run(words + ["--overwrite", "1"] * fresh, limit)

    def data(self) -> list[str]:
        """The flag for the text, and a few held-out documents."""
        return ["--data_path", *self.args.data_path, "--heldout_fraction", "0.02"]

    def records(self, name: str) -> list[dict]:
        """The metrics of a training."""
        (path,) = (self.folder / name).glob("*_metrics.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def add(self, name: str, work: Callable[["Acceptance"], tuple[str, Any]]) -> None:
        """Do a part, whatever becomes of it, and keep what is known so far."""
        since = time.monotonic()
        try:
            if self.left() < 10:
                raise Failed("there was no time left")
            text, data = work(self)
        except Exception as error:
            text, data = f"**failed:** {type(error).__name__}: {error}", {"failed": str(error)}
        seconds = time.monotonic() - since
        print(f"{name}: {text.splitlines()[0]:.100} ({seconds:.0f} s)", flush=True)
        self.pages.append(f"## {name}\n\n{text}\n\n({seconds:.0f} s)\n")
        self.found[name] = {"seconds": round(seconds, 1), "found": data}
        head = f"# A first report from a GPU\n\n{surroundings(self.args, 'bench.gpu_acceptance')}"
        Path(f"{self.args.report}.md").write_text("\n\n".join([head, *self.pages]))
        Path(f"{self.args.report}.json").write_text(json.dumps(self.found, indent=1))


def last_lines(output: str) -> str:
    """The end of what a process printed, as a Markdown block."""
    return "```\n" + "\n".join(output.strip().splitlines()[-12:]) + "\n```"


def pass_line(output: str) -> str:
    """How a run computes a pass, and what it warned of."""
    lines = [line for line in output.splitlines() if line.startswith(("pass: ", "warning: "))]
    return "; ".join(line for line in lines if "updates: a model learns" not in line)


# ------------------------------------------------------------------------------------- the parts


def machine(acceptance: Acceptance) -> tuple[str, Any]:
    """Card, memory, versions."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gib": round(properties.total_memory / 2**30, 1),
        }
    return ", ".join(f"{name} {value}" for name, value in found.items()), found


def tests(acceptance: Acceptance) -> tuple[str, Any]:
    """The tests that need a card."""
    if acceptance.args.device == "cpu":
        return "left out: no card", None
    output = acceptance.run(["-m", "pytest", "-m", "gpu", "-q", "--tb=line", "tests"], 150)
    return output.strip().splitlines()[-1], last_lines(output)


def presets(acceptance: Acceptance) -> tuple[str, Any]:
    """A few updates of each preset, by its fast paths."""
    lines, found = [], {}
    for preset in acceptance.args.presets:
        try:
            flags = f"--preset {preset} --batch_size 8 --accumulation_steps 2 --epochs 1"
            output = acceptance.train(preset, 90, f"{flags} --log_interval 1 --max_seq_len 128")
            losses = [r["loss"] for r in acceptance.records(preset) if "loss" in r]
            found[preset] = {"pass": pass_line(output), "first": losses[0], "last": losses[-1]}
            lines.append(
                f"- {preset}: {len(losses)} updates, loss {losses[0]:.3f} to {losses[-1]:.3f}; "
                f"{pass_line(output)}"
            )
        except Exception as error:
            lines.append(f"- {preset}: **failed:** {error}")
            found[preset] = {"failed": str(error)}
    return "\n".join(lines), found


def resume(acceptance: Acceptance) -> tuple[str, Any]:
    """The losses of a run that goes back to a state, beside those of the run itself."""
    flags = f"--preset {acceptance.args.presets[0]} --batch_size 8 --accumulation_steps 2 "
    flags += "--epochs 1 --log_interval 1 --save_interval 5 --keep_states 999 --max_seq_len 128"
    acceptance.train("resumed", 90, flags)
    before = {r["step"]: r["loss"] for r in acceptance.records("resumed") if "loss" in r}
    acceptance.train("resumed", 90, f"{flags} --from_resume 1 --resume_step 5", fresh=False)
    after = {r["step"]: r["loss"] for r in acceptance.records("resumed") if "loss" in r}
    worst = max(abs(after[step] - before[step]) for step in before)
    same = before.keys() == after.keys()
    text = f"{len(before)} updates, again from update 5: losses differ by at most {worst:.2g}"
    return text + ("" if same else "; **the steps differ**"), {"worst": worst, "same": same}


def dry_run(acceptance: Acceptance) -> tuple[str, Any]:
    """What --dry_run says of the default run."""
    output = acceptance.train("dry", 120, f"--preset {acceptance.args.presets[0]} --dry_run 1")
    lines = [line for line in output.splitlines() if line.startswith(("dry run", "pass", "warn"))]
    return "\n".join(f"- {line}" for line in lines), lines


def benchmark(acceptance: Acceptance) -> tuple[str, Any]:
    """Useful tokens a second beside the padded recipe; starts with cold and with warm caches."""
    path = acceptance.folder / "benchmark.json"
    words = ["-m", "bench.benchmark", "--device", acceptance.args.device, "--json", str(path)]
    words += ["--preset", *acceptance.args.measured, "--data_path", *acceptance.args.data_path]
    words += ["--turns", "2", "--seconds", str(acceptance.args.seconds)]
    words += ["--only", "padded recipe", "ours, started again", "ours with Muon", "ours, eager"]
    output = acceptance.run(words, 240)
    tables = output[output.find("\n--preset") :] if "\n--preset" in output else output
    return tables.strip(), json.loads(path.read_text())


def profile(acceptance: Acceptance) -> tuple[str, Any]:
    """Where the time of an update goes, beside the prediction for an H100."""
    path = acceptance.folder / "profile.json"
    words = ["-m", "bench.gpu_acceptance", "--profile", str(path), "--data_path"]
    words += acceptance.args.data_path
    words += ["--device", acceptance.args.device, "--presets", acceptance.args.presets[0]]
    acceptance.run(words, 120)
    found = json.loads(path.read_text())
    lines = ["| group | ns a token | of the update | predicted for an H100 |", "|---|---|---|---|"]
    total = max(sum(found["ns"].values()), 1e-9)
    for group, predicted in PREDICTED.items():
        ns = found["ns"].get(group, 0.0)
        lines.append(f"| {group} | {ns:,.0f} | {ns / total:.0%} | {predicted} |")
    lines.append(f"| sum | {total:,.0f} | | {sum(PREDICTED.values()):,} |")
    rows = f"Peak memory {found['peak_gib']:.1f} GiB, {found['rows']} rows at once."
    return "\n".join([*lines, "", rows]), found


def learning(acceptance: Acceptance) -> tuple[str, Any]:
    """Held-out loss after the same minutes of AdamW and of the best recipe."""
    recipes = {
        "AdamW, as by default": "",
        "Muon, wsd": "--optimizer muon --lr_schedule wsd --warmup_ratio 0.02 --learning_rate 2e-3",
    }
    lines, found = ["| recipe | held-out bits/byte | tokens | updates |", "|---|---|---|---|"], {}
    minutes = acceptance.args.minutes
    for number, (recipe, flags) in enumerate(recipes.items()):
        flags += f" --preset {acceptance.args.presets[0]} --max_minutes {minutes}"
        acceptance.train(f"learning{number}", 60 * minutes + 90, flags)
        records = acceptance.records(f"learning{number}")
        scored = next(r for r in reversed(records) if "heldout_bits_per_byte" in r)
        last = next(r for r in reversed(records) if "tokens" in r)
        found[recipe] = {"bits_per_byte": scored["heldout_bits_per_byte"], "tokens": last["tokens"]}
        lines.append(
            f"| {recipe} | {scored['heldout_bits_per_byte']:.4f} | {last['tokens']:,} "
            f"| {last['step']:,} |"
        )
    return "\n".join([f"After {minutes:g} minutes each:", "", *lines]), found


PARTS: dict[str, Callable[[Acceptance], tuple[str, Any]]] = {
    "machine": machine,
    "presets": presets,
    "resume": resume,
    "dry run": dry_run,
    "benchmark": benchmark,
    "profile": profile,
    "tests": tests,
    "learning": learning,
}

# ---------------------------------------------------------------------------------- the profile


class Profiling(NoGuard):
    """Profiles one update, and ends the run. Args: path: of the JSON to write."""

    def __init__(self, path: Path) -> None:
        self.path, self.updates = path, 0

    def step(self, run: Run, window: list[Batch], num_labels: int) -> Outcome:
        """One update, as in ``train_step``."""
        self.updates += 1
        if self.updates <= UPDATES_BEFORE_PROFILE:
            return Parts().step(run, window, num_labels)
        on_cuda = run.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] * on_cuda
        with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
            Parts().step(run, window, num_labels).grad_norm.item()  # waits for the device
        tokens = sum(batch.input_ids.numel() for batch in window)
        ns: dict[str, float] = {}
        for event in found.key_averages(group_by_input_shape=True):
            micros = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            group = group_of(event.key, str(event.input_shapes), run)
            # An operation and its kernels tell of the same time. Products are told by their
            # operations, which know the shapes, and everything else by its kernels.
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            if on_cuda and is_kernel == (group in PRODUCTS):
                continue
            ns[group] = ns.get(group, 0.0) + 1000 * micros / tokens
        peak = torch.cuda.max_memory_allocated() if on_cuda else 0
        report = {"ns": ns, "tokens": tokens, "rows": run.micro_batch, "peak_gib": peak / 2**30}
        self.path.write_text(json.dumps(report))
        raise SystemExit(0)


def group_of(name: str, shapes: str, run: Run) -> str:
    """The group, in PREDICTED, of an operation or kernel."""
    config, numbers = run.config, set(map(int, re.findall(r"\d+", shapes)))
    width = config.moe_intermediate_size if config.use_moe else config.intermediate_size
    if re.search(r"::(add)?mm$|::_?grouped_mm|gemm|cutlass|nvjet|cublas|xmma", name):
        if config.vocab_size in numbers:
            return "products of the head"
        inside = {width, 2 * width} & numbers
        return "products of feed-forward" if inside else "products of attention"
    if re.search(r"flash|attention|fmha", name, re.IGNORECASE):
        return "attention"
    if re.search(r"adam|foreach|multi_tensor|lerp", name, re.IGNORECASE):
        return "optimizer and clipping"
    return "fused elementwise" if "triton" in name else "everything else"


# ----------------------------------------------------------------------------------------- main


def main() -> None:
    """Make the report."""
    cli = parser(__doc__)
    sample = PRESETS["demo"]["data_path"]
    cli.add_argument("--data_path", nargs="+", default=sample, help="text to train on")
    cli.add_argument("--presets", nargs="+", default=["64m", "moe", "26m", "104m", "demo"])
    cli.add_argument("--measured", nargs="+", default=["64m", "moe"], help="by the benchmark")
    cli.add_argument("--seconds", type=float, default=2.5, help="of a turn of the benchmark")
    cli.add_argument("--minutes", type=float, default=1.0, help="of each recipe")
    cli.add_argument("--budget_minutes", type=float, default=8.0, help="of the whole report")
    cli.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    cli.add_argument("--report", default="gpu_report", help="path of the report, without ending")
    cli.add_argument("--profile", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.profile:
        guard = Profiling(Path(args.profile))
        words = ["--preset", args.presets[0], "--device", args.device, "--epochs", "1000"]
        with tempfile.TemporaryDirectory() as folder:
            words += ["--save_dir", folder, "--cache_dir", folder, "--eval_interval", "1000000"]
            train([*words, "--data_path", *args.data_path], guard, Parts(step=guard.step))
        return
    with tempfile.TemporaryDirectory() as folder:
        acceptance = Acceptance(args, Path(folder))
        for name in args.only:
            acceptance.add(name, PARTS[name])
    print(f"written: {args.report}.md and {args.report}.json")


if __name__ == "__main__":
    main()
