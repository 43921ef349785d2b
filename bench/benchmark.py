"""Useful tokens a second: the padded recipe, ours, and ours with each technique switched off.

    python -m bench.benchmark --preset demo --device cpu      # minutes on a laptop's CPU
    python -m bench.benchmark --preset 64m moe                # minutes on a GPU

Each variant is a process of its own that trains the same model on the same text with the trainer's
own loop. They take turns, a few seconds each, so that a busy machine slows all of them alike. A
useful token is one that is trained with a loss: padding is not counted, nor is a row's first token.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedTokenizerBase

import train_pretrain
from bench.measuring import (
    OURS,
    NoGuard,
    Parts,
    built_with,
    drawn_outputs,
    parser,
    redraw,
    surroundings,
    train,
    words,
)
from dataset.lm_dataset import IGNORE, Batch, PretrainDataset
from dataset.records import find_files, read_documents
from model.model_minimind import MoEFeedForward
from trainer.fast_paths import ATTENTION, ROWS_ON_DEVICE
from trainer.flags import TrainConfig
from trainer.metrics import flops_per_token, peak_flops
from trainer.muon import Muon
from trainer.optimizer import Tuning
from trainer.progress import Outcome
from trainer.run import Run
from trainer.step_times import StepTimes
from trainer.weights import get_model_params

SECONDS = {"cpu": 6.0, "cuda": 2.5, "mps": 4.0}  # of one turn
PADDED_LENGTH = 340  # MiniMind's


@dataclass
class Variant:
    """One line of the table: flags over ours as shipped, and parts that no flag can exchange."""

    name: str
    flags: dict[str, object] = field(default_factory=dict)
    parts: Parts = OURS
    cold: bool = False  # its start is measured, imports included


# --------------------------------------------------------------------- optimizers in torch's loops


class PlainAdamW(torch.optim.AdamW):
    """AdamW that runs an operation at a time, a tensor at a time."""

    found_inf: Tensor  # whether the update is not finite, see ``step_if_finite``

    def step(self, closure: None = None) -> None:
        """One update, finite or not: torch's loop refuses to look at ``found_inf``."""
        vars(self).pop("found_inf", None)
        super().step()


def plain_adamw(run: Run) -> None:
    """The same parameters and weight decay with an AdamW that is not fused."""
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in run.optimizer.param_groups
    ]
    run.optimizer = PlainAdamW(groups, betas=Tuning().betas, foreach=False)


class MuonInALoop(Muon):
    """torch.optim.Muon for the layers' matrices: one after another, and none that are stacked.

    It does not leave out an update that is not finite; here only its speed is asked."""

    def __init__(self, ours: Muon, **settings: Any) -> None:
        super().__init__(ours.param_groups, ours.defaults["lr"], Tuning().betas, ours.dtype)
        (hidden,) = (group["params"] for group in self.param_groups if "momentum" in group)
        self.loop = torch.optim.Muon(hidden, **settings)

    def _step_matrices(self, group: dict) -> None:
        self.loop.param_groups[0]["lr"] = group["lr"]
        self.loop.step()


def muon_in_a_loop(run: Run) -> None:
    """Matrices move one after another, where ours stacks those of one shape."""
    assert isinstance(run.optimizer, Muon)
    run.optimizer = MuonInALoop(run.optimizer, adjust_lr_fn="match_rms_adamw")


# -------------------------------------------------------------------------- other parts of a run


def looking_at_each_loss(run: Run, window: list[Batch], num_labels: int) -> Outcome:
    """The host looks at each update's outcome, and so waits for the device."""
    outcome = train_pretrain.train_step(run, window, num_labels)
    outcome.grad_norm.item()
    return outcome


def without(fast_path: str, run: Run) -> None:
    """The plain path in place of a fast one."""
    run.fast_paths[fast_path] = "is what the benchmark leaves out"


class LoopingExperts(MoEFeedForward):
    """One expert after another: each asks the device which tokens are its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes and result as in ``MoEFeedForward``."""
        tokens = x.flatten(0, 1)
        probs = self.gate(tokens).float().softmax(-1)
        weight, used = probs.topk(self.num_used, dim=-1)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        experts = self.experts
        for i in range(self.num_experts):
            chosen = used == i
            if chosen.any():  # here the host waits
                at, nth = chosen.nonzero(as_tuple=True)
                own = tokens[at]
                gate = linear(own, experts.gate_proj[i])
                out = linear(
                    experts.act(gate) * linear(own, experts.up_proj[i]), experts.down_proj[i]
                )
                y.index_add_(0, at, (out * weight[at, nth, None]).to(y.dtype))
        rows = x.shape[:2]
        return y.view_as(x), probs.view(*rows, -1), used.view(*rows, -1)


def looping_experts(run: Run) -> None:
    """The same router and experts in each layer, called in a loop; nothing in a dense model."""
    for layer in run.model.model.layers:
        if isinstance(stacked := layer.mlp, MoEFeedForward):
            looping = LoopingExperts(run.config)
            looping.gate, looping.experts = stacked.gate, stacked.experts
            layer.mlp = looping


# ---------------------------------------------------------------------------- the padded recipe


class Padded(PretrainDataset):
    """One document a row, tokenized when it is asked for, cut and padded."""

    def __init__(
        self, data_path: list[str], tokenizer: PreTrainedTokenizerBase, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(data_path, tokenizer, *args, **kwargs)
        self.tokenizer = tokenizer
        files = find_files(data_path)
        self.texts = [text for file in files for text, _ in read_documents(file) if text.strip()]

    def __getitems__(self, rows: list[int]) -> Batch:
        """The given rows; those past the last are all padding."""
        made, length = [], self.row_length
        for row in rows:
            text = self.texts[int(self.order[row])] if row < len(self.order) else ""
            ids = self.tokenizer(
                text, add_special_tokens=False, max_length=length - 2, truncation=True
            ).input_ids
            ids = [self.bos, *ids, self.eos] if text else []
            made.append(ids + [self.pad] * (length - len(ids)))
        ids = torch.tensor(made)
        labels = ids.masked_fill(ids == self.pad, IGNORE)
        return Batch(ids, labels, None, int((labels[:, 1:] != IGNORE).sum()))


def open_padded(args: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Padded:
    """The documents of --data_path as padded rows, made on the host."""
    return Padded(
        args.data_path,
        tokenizer,
        args.max_seq_len,
        packing=False,
        seed=args.seed,
        cache_dir=args.cache_dir,
    )


def padded_flags(on_cuda: bool) -> dict[str, object]:
    """MiniMind's settings: 256 rows an update, 32 at once, nothing compiled, no warm-up."""
    return {
        "packing": 0,
        "max_seq_len": PADDED_LENGTH,
        "batch_size": 32,
        "accumulation_steps": 8,
        "micro_batch_size": 32,
        "use_compile": 0,
        "num_workers": 8 if on_cuda else 0,
        "dtype": "bfloat16" if on_cuda else "float32",
        "optimizer": "adamw",
        "lr_schedule": "cosine",
        "warmup_ratio": 0,
    }


PADDED = Parts(
    open_padded, built_with(partial(redraw, drawn_outputs), looping_experts, plain_adamw)
)


def variants(on_cuda: bool, use_moe: bool) -> list[Variant]:
    """The padded recipe, ours, ours less one technique each."""

    def changed(change: Callable[[Run], None]) -> Parts:
        return OURS._replace(build_run=built_with(change))

    compiled = 0 if on_cuda else 1
    found = [
        Variant("padded recipe", padded_flags(on_cuda), PADDED, cold=True),
        Variant("ours", cold=True),
        Variant("ours, started again", cold=True),  # caches are warm; else what noise there is
        Variant("ours, padded rows", {"packing": 0}),
        Variant("ours, plain AdamW", parts=changed(plain_adamw)),
        Variant("ours, float32", {"dtype": "float32"}),
        Variant(f"ours, {'eager' if on_cuda else 'compiled'}", {"use_compile": compiled}),
    ]
    if on_cuda:
        found += [
            Variant("ours, 32 rows at once", {"micro_batch_size": 32}),
            Variant("ours, rows from the host", parts=changed(partial(without, ROWS_ON_DEVICE))),
            Variant("ours, attention by mask", parts=changed(partial(without, ATTENTION))),
            Variant("ours, looking at each loss", parts=OURS._replace(step=looking_at_each_loss)),
        ]
    found.append(Variant("ours with Muon", {"optimizer": "muon"}))
    if use_moe:
        found.append(
            Variant("ours, a loop over experts", {"use_compile": 0}, changed(looping_experts))
        )
    else:
        found.append(
            Variant("ours with torch's Muon", {"optimizer": "muon"}, changed(muon_in_a_loop))
        )
    return found


# ------------------------------------------------------------------------------- one variant


class DataTimes(StepTimes):
    """Keeps the seconds that were spent waiting for data, whoever reads them."""

    waited = 0.0

    def read(self) -> dict[str, float]:
        """Seconds by part, as in ``StepTimes``; waits for the device."""
        seconds = super().read()
        self.waited += seconds.get("data", 0.0)
        return seconds


class Turn(NoGuard):
    """Guard and step of a child: counts what it does between the parent's words.

    Args:
        since: when the child was started, by time.time().
        parts: the variant's."""

    def __init__(self, pipe: Connection, since: float, parts: Parts) -> None:
        self.pipe, self.since, self.parts = pipe, since, parts
        self.until: float | None = None  # when the turn ends; None before the first one

    def begin(self, run: Run, state: None, num_bad_records: int) -> bool:
        """Here data, model and optimizer are ready, and what is to be compiled is not."""
        self.ready = time.time()
        run.times = self.times = DataTimes(run.device)
        return super().begin(run, state, num_bad_records)

    def step(self, run: Run, window: list[Batch], num_labels: int) -> Outcome:
        """One update. After the first one, and at the end of a turn, wait and report."""
        outcome = self.parts.step(run, window, num_labels)
        if self.until is None:
            self.times.read()  # waits for the device
            now = time.time()
            took = {"first": now - self.since, "first_step": now - self.ready}
            self.report(**took, flops=flops(run), rows=run.micro_batch)
            return outcome
        self.tokens += num_labels
        self.positions += sum(batch.input_ids.numel() for batch in window)
        if time.perf_counter() >= self.until:
            self.times.read()
            self.report(
                seconds=time.perf_counter() - self.began,
                tokens=self.tokens,
                positions=self.positions,
                waited=self.times.waited,
            )
        return outcome

    def report(self, **measured: float) -> None:
        """Tell what was measured, and wait for the word to go on for so many seconds."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            memory = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # for the next one's turn
        self.pipe.send(measured | {"memory": memory})
        seconds = self.pipe.recv()
        if seconds is None:
            raise SystemExit
        self.tokens = self.positions = 0
        self.times.restart()
        self.times.waited = 0.0
        self.began = time.perf_counter()
        self.until = self.began + seconds


def flops(run: Run) -> float:
    """Operations of a token in rows of this run's length."""
    _, active = get_model_params(run.model, run.config)
    return flops_per_token(run.config, active, run.args.max_seq_len)


def train_variant(pipe: Connection, variant: Variant, flags: list[str], since: float) -> None:
    """Train until the parent has heard enough, held after the first update and each turn."""
    multiprocessing.set_start_method(None, force=True)  # of loader processes: not this one's
    turn = Turn(pipe, since, variant.parts)
    train(flags, turn, variant.parts._replace(step=turn.step))


class Child:
    """A variant's process, as the parent sees it."""

    def __init__(self, variant: Variant, flags: list[str], result: dict) -> None:
        if variant.cold:
            context = multiprocessing.get_context("spawn")
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["bench.measuring"])  # its imports are paid once
        self.result = result
        self.pipe, theirs = context.Pipe()
        given = (theirs, variant, flags, time.time())
        self.process = context.Process(target=train_variant, args=given)
        self.process.start()
        theirs.close()

    def hear(self) -> dict | None:
        """What it did; None if it ended before its time, which is said."""
        with contextlib.suppress(EOFError, ConnectionError):
            return self.pipe.recv()
        self.process.join()
        print(f"{self.result['name']}: failed, the cause is above", file=sys.stderr)
        return None


# ------------------------------------------------------------------------------- the table


def measure(args: argparse.Namespace, preset: str) -> list[dict]:
    """Start every variant, then let them take turns. Returns: one result a variant."""
    seconds = args.seconds or SECONDS[args.device.split(":")[0]]
    chosen = [
        variant
        for variant in variants(args.device.startswith("cuda"), preset == "moe")
        if not args.only or variant.name in args.only
    ]
    results, living = [], []
    with tempfile.TemporaryDirectory() as folder:
        rows = {}  # at once, as ours chose: later ones find less memory free, and would choose less
        for number, variant in enumerate(chosen):
            flags = (
                {
                    "preset": preset,
                    "device": args.device,
                    "seed": 1,
                    "epochs": 10**6,
                    "save_dir": Path(folder) / str(number),
                    "cache_dir": Path(folder) / "cache",
                    "log_interval": 10,
                    "save_interval": 10**9,
                    "eval_interval": 10**9,
                    "heldout_fraction": 0,
                    "optimizer": "adamw",
                }
                | rows
                | variant.flags
                | ({"data_path": args.data_path} if args.data_path else {})
            )
            result = {"name": variant.name, "turns": [], "cold": variant.cold}
            results.append(result)
            child = Child(variant, words(flags), result)
            if said := child.hear():
                living.append(child)
                result |= said
                if variant.name == "ours" and args.device.startswith("cuda"):
                    rows = {"micro_batch_size": said["rows"]}
                print(f"{variant.name}: first update after {said['first']:.1f} s", file=sys.stderr)
        for turn in range(args.turns + 1):
            for child in [*living] if turn % 2 else [*reversed(living)]:
                child.pipe.send(seconds if turn else seconds / 3)  # the first only warms up
                said = child.hear()
                if said is None:
                    living.remove(child)
                elif turn:
                    child.result["turns"].append(said)
                    child.result["memory"] = said["memory"]
        for child in living:
            child.pipe.send(None)
            child.process.join()
    return results


def table(args: argparse.Namespace, results: list[dict]) -> str:
    """Markdown; speeds are medians over turns, with the lowest and highest."""
    peak = peak_flops(torch.device(args.device))
    base = next((r for r in results if r["name"] == "padded recipe" and r["turns"]), None)
    base_speed = base and statistics.median(t["tokens"] / t["seconds"] for t in base["turns"])
    lines = [
        "| variant | useful tokens/s | lowest to highest | times the padded | useful share | MFU "
        "| waiting for data | rows at once | peak memory | to the first update "
        "| of it compiling, first pass |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        turns = result["turns"]
        if not turns:
            lines.append(f"| {result['name']} | failed | | | | | | | | |")
            continue
        speeds = sorted(turn["tokens"] / turn["seconds"] for turn in turns)
        speed = statistics.median(speeds)
        ratio = f"{speed / base_speed:.2f}" if base_speed else ""
        total = {key: sum(turn[key] for turn in turns) for key in turns[0]}
        start = f"{result['first']:.1f} s" if result["cold"] else ""
        mfu = f"{speed * result['flops'] / peak:.1%}" if peak else "no peak known"
        lines.append(
            f"| {result['name']} | {speed:,.0f} | {speeds[0]:,.0f} to {speeds[-1]:,.0f} | {ratio} "
            f"| {total['tokens'] / total['positions']:.0%} | {mfu} "
            f"| {total['waited'] / total['seconds']:.1%} | {result['rows']} "
            f"| {result['memory'] / 2**30:.2f} GiB "
            f"| {start} | {result['first_step']:.1f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    cli = parser(__doc__)
    cli.add_argument("--preset", nargs="+", default=["demo"])
    cli.add_argument("--data_path", nargs="+", help="None: the preset's")
    cli.add_argument("--turns", type=int, default=3, help="of each variant")
    cli.add_argument("--seconds", type=float, help="of one turn")
    cli.add_argument("--only", nargs="+", help="variants of these names")
    cli.add_argument("--json", help="file for all that was measured")
    args = cli.parse_args()
    print(surroundings(args, "bench.benchmark"))
    found = {}
    for preset in args.preset:
        found[preset] = measure(args, preset)
        print(f"\n--preset {preset}\n\n{table(args, found[preset])}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
