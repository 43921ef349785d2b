"""The first minutes on a card: everything that only a GPU can show, in one report.

    python -m bench.gpu_acceptance                      # eight minutes; writes gpu_report.md, .json
    python -m bench.gpu_acceptance --data_path my.jsonl --minutes 2

Each part is a process of its own with a time limit, so one that fails or hangs costs the report
nothing but itself, and the report says which; gpu_report.log has all that they printed. Needs
torch, transformers and tqdm; pytest for the tests.
"""

import argparse
import contextlib
import importlib.util
import itertools
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
from dataset.records import find_files, read_documents
from trainer.command_line import parse_flags
from trainer.flags import PRESETS, TrainConfig
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
UPDATES_BEFORE_TIMING, UPDATES_TIMED = 3, 5
UPDATES_OF_A_PRESET = 10
SECONDS_TO_END = 5.0  # of a process that took too long
BYTES_PER_TOKEN = 3.0  # of text, about


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
        # A shell's background programs ignore it, and children would inherit that: see ``stop``.
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
            output = stop(process)
            self.log(words, output)
            raise Failed(f"took more than {limit:.0f} s; the end:\n{last_lines(output)}") from None
        self.log(words, output)
        if process.returncode:
            raise Failed(f"exit status {process.returncode}; the end:\n{last_lines(output)}")
        return output

    def log(self, words: list[str], output: str) -> None:
        """Keep what a process printed."""
        with open(f"{self.args.report}.log", "a", encoding="utf-8") as file:
            file.write(f"{time.monotonic() - self.began:.0f} s: {' '.join(words)}\n{output}\n")

    def train(
        self, name: str, limit: float, flags: str, fresh: bool = True, updates: int | None = None
    ) -> str:
        """Train, in files of its own, on all text or as much as ``updates`` take.

        Returns: what it printed."""
        words = ["train_pretrain.py", "--device", self.args.device, *flags.split()]
        words += ["--save_dir", str(self.folder / name), "--cache_dir", str(self.folder / "cache")]
        words += ["--checkpoint_dir", str(self.folder / f"{name}_states")]
        data = self.args.data_path
        if updates:
            data = [self.excerpt(parse_flags(flags.split()), updates)]
        words += ["--data_path", *data, "--heldout_fraction", "0.02"]
        return self.run(words + ["--overwrite", "1"] * fresh, limit)

    def excerpt(self, config: TrainConfig, updates: int) -> str:
        """Path of a file with the text of about so many updates, repeated if need be."""
        tokens = updates * config.max_seq_len * config.batch_size * config.accumulation_steps
        path, left = self.folder / f"excerpt_{tokens}.jsonl", tokens * BYTES_PER_TOKEN
        with path.open("w", encoding="utf-8") as file:
            for source in itertools.cycle(find_files(self.args.data_path)):
                for text, _ in read_documents(source):
                    if left <= 0:
                        return str(path)
                    left -= len(text.encode())
                    file.write(json.dumps({"text": text}) + "\n")
        raise AssertionError("there is always a file, and a document in it")

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


def stop(process: subprocess.Popen[str]) -> str:
    """End a process and its children, gently at first: then it says where it was.

    Returns: what it printed."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    with contextlib.suppress(ProcessLookupError):  # children that outlive it
        os.killpg(process.pid, signal.SIGKILL)
    return output


def last_lines(output: str) -> str:
    """The end of what a process printed, as a Markdown block."""
    return "```\n" + "\n".join(output.strip().splitlines()[-25:]) + "\n```"


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
    words = ["-m", "pytest", "-m", "gpu", "-q", "--tb=short", "tests"]
    words += ["-p", "no:benchmark"]  # it warns beside xdist, and tests take warnings for errors
    words += ["-n", "8"] * (importlib.util.find_spec("xdist") is not None)
    output = acceptance.run(words, 150)
    return output.strip().splitlines()[-1], last_lines(output)


def presets(acceptance: Acceptance) -> tuple[str, Any]:
    """A few updates of each preset, by its fast paths."""
    lines, found = [], {}
    for preset in acceptance.args.presets:
        try:
            flags = f"--preset {preset} --epochs 1 --log_interval 1"
            output = acceptance.train(preset, 120, flags, updates=UPDATES_OF_A_PRESET)
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
    flags = f"--preset {acceptance.args.presets[0]} --epochs 1 "
    flags += "--log_interval 1 --save_interval 5 --keep_states 999"
    length = UPDATES_OF_A_PRESET
    acceptance.train("resumed", 90, flags, updates=length)
    before = {r["step"]: r["loss"] for r in acceptance.records("resumed") if "loss" in r}
    flags += " --from_resume 1 --resume_step 5"
    acceptance.train("resumed", 90, flags, fresh=False, updates=length)
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
    tables, found = [], {}
    for preset in acceptance.args.measured:
        words = ["-m", "bench.benchmark", "--device", acceptance.args.device, "--json", str(path)]
        words += ["--preset", preset, "--data_path", *acceptance.args.data_path]
        words += ["--turns", "2", "--seconds", str(acceptance.args.seconds)]
        words += ["--only", "padded recipe", "ours", "ours, started again", "ours with Muon"]
        try:
            output = acceptance.run(words, 240 if acceptance.args.device != "cpu" else 600)
            tables.append(output[output.find("\n--preset") :].strip())
            found |= json.loads(path.read_text())
        except Failed as error:
            tables.append(f"--preset {preset}: **failed:** {error}")
            found[preset] = {"failed": str(error)}
    return "\n\n".join(tables), found


def profile(acceptance: Acceptance) -> tuple[str, Any]:
    """Where the time of an update goes, beside the prediction for an H100."""
    path = acceptance.folder / "profile.json"
    words = ["-m", "bench.gpu_acceptance", "--profile", str(path), "--data_path"]
    words += acceptance.args.data_path
    words += ["--device", acceptance.args.device, "--presets", acceptance.args.presets[0]]
    words += ["--cache", str(acceptance.folder / "cache")]
    acceptance.run(words, 120)
    found = json.loads(path.read_text())
    lines = ["| group | ns a token | of the update | predicted for an H100 |", "|---|---|---|---|"]
    total = max(sum(found["ns"].values()), 1e-9)
    for group, predicted in PREDICTED.items():
        ns = found["ns"].get(group, 0.0)
        lines.append(f"| {group} | {ns:,.0f} | {ns / total:.0%} | {predicted} |")
    lines.append(f"| sum | {total:,.0f} | | {sum(PREDICTED.values()):,} |")
    rows = f"An update took {found['ns_by_the_clock']:,.0f} ns a token, unprofiled. "
    rows += f"Peak memory {found['peak_gib']:.1f} GiB, {found['rows']} rows at once."
    return "\n".join([*lines, "", rows]), found


def learning(acceptance: Acceptance) -> tuple[str, Any]:
    """Held-out loss after the same minutes of MiniMind's recipe and of the best one."""
    recipes = {"MiniMind's": "", "the best": "--recipe best"}
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


# What tells most comes first: parts for which no time is left are named, and left out.
PARTS: dict[str, Callable[[Acceptance], tuple[str, Any]]] = {
    "machine": machine,
    "tests": tests,
    "profile": profile,
    "benchmark": benchmark,
    "resume": resume,
    "dry run": dry_run,
    "presets": presets,
    "learning": learning,
}

# ---------------------------------------------------------------------------------- the profile


class Profiling(NoGuard):
    """Times some updates, profiles the next one, and ends the run. Args: path: of the JSON."""

    def __init__(self, path: Path) -> None:
        self.path, self.updates, self.tokens, self.since = path, 0, 0, 0.0

    def step(self, run: Run, window: list[Batch], num_labels: int) -> Outcome:
        """One update, as in ``train_step``."""
        self.updates += 1
        if self.updates <= UPDATES_BEFORE_TIMING + UPDATES_TIMED:
            outcome = Parts().step(run, window, num_labels)
            if self.updates > UPDATES_BEFORE_TIMING:
                self.tokens += sum(batch.input_ids.numel() for batch in window)
            if self.updates in (UPDATES_BEFORE_TIMING, UPDATES_BEFORE_TIMING + UPDATES_TIMED):
                outcome.grad_norm.item()  # waits for the device
                self.since, began = time.perf_counter(), self.since
                self.seconds = self.since - began
            return outcome
        on_cuda = run.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] * on_cuda
        with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
            Parts().step(run, window, num_labels).grad_norm.item()  # waits for the device
        tokens = sum(batch.input_ids.numel() for batch in window)
        events = [
            (group_of(event.key, str(event.input_shapes), run), 1000 * micros / tokens, event)
            for event in found.key_averages(group_by_input_shape=True)
            if (micros := event.self_device_time_total if on_cuda else event.self_cpu_time_total)
        ]
        # An operation and its kernels tell of the same time. Products are told by their
        # operations, which know the shapes, and everything else by its kernels.
        if on_cuda:
            events = [(g, ns, e) for g, ns, e in events if is_kernel(e) != (g in PRODUCTS)]
        by_group = dict.fromkeys(PREDICTED, 0.0)
        for group, ns, _ in events:
            by_group[group] += ns
        longest = sorted(events, key=lambda event: -event[1])[:50]
        peak = torch.cuda.max_memory_allocated() if on_cuda else 0
        report = {
            "ns": by_group,
            "ns_by_the_clock": 1e9 * self.seconds / self.tokens,
            "tokens": tokens,
            "rows": run.micro_batch,
            "peak_gib": peak / 2**30,
            "longest": [(g, round(ns, 2), e.key, str(e.input_shapes)) for g, ns, e in longest],
        }
        self.path.write_text(json.dumps(report))
        raise SystemExit(0)


def is_kernel(event: Any) -> bool:
    """Whether a profiler's event is a kernel's, rather than an operation's or a mark's above it."""
    is_mark = event.key.startswith(("## ", "Optimizer."))
    return event.device_type == torch.autograd.DeviceType.CUDA and not is_mark


def group_of(name: str, shapes: str, run: Run) -> str:
    """The group, in PREDICTED, of an operation or kernel."""
    config, numbers = run.config, set(map(int, re.findall(r"\d+", shapes)))
    width = config.moe_intermediate_size if config.use_moe else config.intermediate_size
    if re.search(r"flash|attention|fmha", name, re.IGNORECASE):
        return "attention"  # first: its names also tell of the library that it is written in
    if re.search(r"::(add)?mm$|::_?grouped_mm|gemm|cutlass|nvjet|cublas|xmma", name):
        if config.vocab_size in numbers:
            return "products of the head"
        inside = {width, 2 * width} & numbers
        return "products of feed-forward" if inside else "products of attention"
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
    cli.add_argument("--cache", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.profile:
        guard = Profiling(Path(args.profile))
        words = ["--preset", args.presets[0], "--device", args.device, "--epochs", "1000"]
        with tempfile.TemporaryDirectory() as folder:
            words += ["--save_dir", folder, "--cache_dir", args.cache, "--eval_interval", "1000000"]
            train([*words, "--data_path", *args.data_path], guard, Parts(step=guard.step))
        return
    with tempfile.TemporaryDirectory() as folder:
        acceptance = Acceptance(args, Path(folder))
        for name in args.only:
            acceptance.add(name, PARTS[name])
    print(f"written: {args.report}.md and {args.report}.json")


if __name__ == "__main__":
    main()
