"""Useful tokens a second: the padded recipe, ours, and ours with each technique switched off.

    python scripts/benchmark.py --preset demo --device cpu      # minutes on a laptop's CPU
    python scripts/benchmark.py --preset 64m moe                # minutes on a GPU

Each variant is a process of its own that trains the same model on the same text with the real
program. They take turns, a few seconds each, so that a machine's moods meet all of them alike. A
useful token is one that is trained with a loss: padding is not counted, nor is a row's first token.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # python puts scripts/ there, as it is this file's folder

SECONDS = {"cpu": 6.0, "cuda": 2.5, "mps": 4.0}  # of one turn


@dataclass
class Variant:
    """One line of the table: flags over ours as shipped, and what no flag can switch off."""

    name: str
    flags: dict[str, object] = field(default_factory=dict)
    patch: Callable[[], None] | None = None
    cold: bool = False  # its start is measured, imports included


# ------------------------------------------------------------------------- what no flag can do


def plain_adamw() -> None:
    """An optimizer that runs an operation at a time, a tensor at a time."""
    import torch

    import train_pretrain

    fused = train_pretrain.build_optimizer

    def unfused(model: torch.nn.Module, *given: object) -> torch.optim.AdamW:
        groups = fused(model, *given).param_groups
        groups = [{k: v for k, v in g.items() if k != "fused"} for g in groups]
        return torch.optim.AdamW(groups, foreach=False)

    def step(optimizer: torch.optim.Optimizer, scaler, sums, grad_norm) -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    train_pretrain.build_optimizer, train_pretrain.step_if_finite = unfused, step


def muon_in_a_loop() -> None:
    """torch.optim.Muon: one matrix after another. It takes none that are stacked."""
    import torch

    from trainer import muon, optimizer

    def step(self: muon.Muon, group: dict) -> None:
        if not hasattr(self, "loop"):
            self.loop = torch.optim.Muon(group["params"], adjust_lr_fn="match_rms_adamw")
        self.loop.param_groups[0]["lr"] = group["lr"]
        self.loop.step()

    muon.Muon._step_matrices = step
    optimizer.skips_bad_updates = lambda build: True  # it does not; only its speed is asked


def rows_from_the_host() -> None:
    """Rows made by the processor and copied, as if the corpus did not fit the device."""
    import train_pretrain

    train_pretrain.PretrainDataset.num_bytes_in_use = property(lambda data: 2**63)


def waiting_for_each_loss() -> None:
    """The host looks at each update's loss, and so waits for the device."""
    import train_pretrain

    step = train_pretrain.train_step

    def looked_at(*args: object) -> object:
        outcome = step(*args)
        outcome.grad_norm.item()
        return outcome

    train_pretrain.train_step = looked_at


def masked_attention() -> None:
    """Attention that computes all pairs of a row's tokens and forgets those between documents."""
    import train_pretrain

    train_pretrain.can_attend_within = lambda *args: False


def looping_experts() -> None:
    """One expert after another: each asks the device which tokens are its own."""
    import torch

    from model import model_minimind

    def loop(self: model_minimind.MoEFeedForward, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
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
                gate = torch.nn.functional.linear(own, experts.gate_proj[i])
                up = torch.nn.functional.linear(own, experts.up_proj[i])
                out = torch.nn.functional.linear(experts.act(gate) * up, experts.down_proj[i])
                y.index_add_(0, at, (out * weight[at, nth, None]).to(y.dtype))
        rows = x.shape[:2]
        return y.view_as(x), probs.view(*rows, -1), used.view(*rows, -1)

    model_minimind.MoEFeedForward.forward = loop


def padded_recipe() -> None:
    """One document a row of 340, tokenized when it is asked for, cut and padded; plain AdamW; all
    matrices drawn at the start."""
    import torch

    import train_pretrain
    from dataset.lm_dataset import IGNORE, Batch
    from dataset.records import find_files, read_documents
    from scripts.measuring import drawn_outputs, initialised

    plain_adamw()
    looping_experts()
    initialised(drawn_outputs)

    class Padded(train_pretrain.PretrainDataset):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.tokenizer = args[1]
            files = find_files(DATA_PATH)
            self.texts = [t for f in files for t, _ in read_documents(f, print) if t.strip()]

        def __getitems__(self, rows: list[int]) -> Batch:
            made = []
            for row in rows:
                text = self.texts[int(self.order[row])] if row < len(self.order) else ""
                length = self.row_length
                ids = self.tokenizer(
                    text, add_special_tokens=False, max_length=length - 2, truncation=True
                ).input_ids
                ids = [self.bos, *ids, self.eos] if text else []
                made.append(ids + [self.pad] * (length - len(ids)))
            ids = torch.tensor(made)
            labels = ids.masked_fill(ids == self.pad, IGNORE)
            return Batch(ids, labels, None, int((labels[:, 1:] != IGNORE).sum()))

    train_pretrain.PretrainDataset = Padded
    rows_from_the_host()


def variants(args: argparse.Namespace, preset: str) -> list[Variant]:
    """The padded recipe, ours, ours less one technique each."""
    on_cuda, moe = args.device.startswith("cuda"), preset == "moe"
    padded = {"packing": 0, "max_seq_len": 340, "batch_size": 32, "accumulation_steps": 8}
    padded |= {"use_compile": 0, "dtype": "bfloat16" if on_cuda else "float32"}
    padded |= {"micro_batch_size": 32}
    padded |= {"num_workers": 8 if on_cuda else 0}
    found = [
        Variant("padded recipe", padded, padded_recipe, cold=True),
        Variant("ours", cold=True),
        Variant("ours, started again", cold=True),  # caches are warm; else what noise there is
        Variant("ours, padded rows", {"packing": 0}),
        Variant("ours, plain AdamW", patch=plain_adamw),
        Variant("ours, float32", {"dtype": "float32"}),
    ]
    compiled = 0 if on_cuda else 1
    found.append(Variant(f"ours, {'eager' if on_cuda else 'compiled'}", {"use_compile": compiled}))
    if on_cuda:
        found += [
            Variant("ours, 32 rows at once", {"micro_batch_size": 32}),
            Variant("ours, rows from the host", patch=rows_from_the_host),
            Variant("ours, attention by mask", patch=masked_attention),
            Variant("ours, looking at each loss", patch=waiting_for_each_loss),
        ]
    found.append(Variant("ours with Muon", {"optimizer": "muon"}))
    if moe:
        found.append(Variant("ours, a loop over experts", {"use_compile": 0}, looping_experts))
    else:
        found.append(Variant("ours with torch's Muon", {"optimizer": "muon"}, muon_in_a_loop))
    return [v for v in found if not args.only or any(part in v.name for part in args.only)]


# ------------------------------------------------------------------------------- one variant


def train_variant(
    pipe: Connection, variant: Variant, argv: list[str], data_path: list[str], since: float
) -> None:
    """Trains with the real program, held before its second update and after each turn."""
    global DATA_PATH
    DATA_PATH = data_path
    import torch

    import train_pretrain
    from trainer.guard import run_folder

    if variant.patch:
        variant.patch()
    turn = Turn(pipe, since)
    train_step, windows = train_pretrain.train_step, train_pretrain.windows

    def timed_windows(run: object, data: object) -> Iterator:
        source = windows(run, data)
        while True:
            begin = time.perf_counter()
            window = next(source, None)
            turn.waited += time.perf_counter() - begin
            if window is None:
                return
            yield window

    def counted_step(run: object, window: list, num_labels: int) -> torch.Tensor:
        turn.first_step_begins = turn.first_step_begins or time.time()
        outcome = train_step(run, window, num_labels)
        turn.count(run, window, num_labels)
        return outcome

    fit_micro_batch = train_pretrain.fit_micro_batch

    def timed_fit(*given: object) -> None:
        turn.first_step_begins = time.time()  # it compiles, so that the first update need not
        fit_micro_batch(*given)

    train_pretrain.fit_micro_batch = timed_fit
    train_pretrain.train_step, train_pretrain.windows = counted_step, timed_windows
    train_pretrain.Run.save = lambda run, tracker: (Path(), 0.0)
    run_folder.RunFolder.add_state = lambda folder, path: None
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        status = train_pretrain.main(argv)
        pipe.send({"ended": status})


class Turn:
    """Counts what a child does between the parent's words."""

    def __init__(self, pipe: Connection, since: float) -> None:
        self.pipe, self.since = pipe, since
        self.updates = self.tokens = self.positions = 0
        self.waited, self.begin, self.until = 0.0, None, 0.0
        self.first_step_begins = 0.0

    def count(self, run: object, window: list, num_labels: int) -> None:
        """An update was given to the device; at the end of a turn wait for it, and report."""
        import torch

        def synchronize() -> None:
            if run.device.type == "cuda":
                torch.cuda.synchronize()

        if self.begin is None:  # the first update: imports, data, model, compiled code
            synchronize()
            now = time.time()
            first = {"first": now - self.since, "first_step": now - self.first_step_begins}
            self.report(**first, flops=flops(run))
        self.updates += 1
        self.tokens += num_labels
        self.positions += sum(batch.input_ids.numel() for batch in window)
        if time.perf_counter() >= self.until:
            synchronize()
            self.report(seconds=time.perf_counter() - self.begin)

    def report(self, **more: float) -> None:
        """Tell what was done, and wait for the word to go on for so many seconds."""
        import torch

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            memory = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # for the next one's turn
        said = {"updates": self.updates, "tokens": self.tokens, "positions": self.positions}
        self.pipe.send(said | {"waited": self.waited, "memory": memory} | more)
        seconds = self.pipe.recv()
        if seconds is None:
            raise SystemExit(0)
        self.updates = self.tokens = self.positions = 0
        self.waited, self.begin = 0.0, time.perf_counter()
        self.until = self.begin + seconds


def flops(run: object) -> float:
    """Operations of a token in rows of this run's length."""
    from trainer.metrics import flops_per_token
    from trainer.weights import get_model_params

    _, active = get_model_params(run.model, run.config)
    return flops_per_token(run.config, active, run.args.max_seq_len)


# ------------------------------------------------------------------------------- the table


def measure(args: argparse.Namespace, preset: str) -> list[dict]:
    """Start every variant, then let them take turns. Returns: one result a variant."""
    seconds = args.seconds or SECONDS[args.device.split(":")[0]]
    data = args.data_path or preset_data(preset)
    os.environ["PYTHONPATH"] = str(ROOT)
    results, living = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(variants(args, preset)):
            own = Path(folder) / str(number)
            flags = {
                "preset": preset, "device": args.device, "seed": 1, "epochs": 10**6,
                "save_dir": own / "out", "checkpoint_dir": own / "checkpoints",
                "cache_dir": Path(folder) / "cache", "log_interval": 10, "save_interval": 10**9,
                "eval_interval": 10**9, "heldout_fraction": 0, "optimizer": "adamw",
            } | variant.flags
            argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            result = {"name": variant.name, "turns": [], "cold": variant.cold}
            results.append(result)
            child = Child(variant, [*argv, "--data_path", *data], data, result)
            if said := child.hear():
                living.append(child)
                result |= said
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


class Child:
    """A variant's process, as the parent sees it."""

    def __init__(self, variant: Variant, argv: list[str], data: list[str], result: dict) -> None:
        context = multiprocessing.get_context("spawn" if variant.cold else "forkserver")
        if not variant.cold:
            context.set_forkserver_preload(["train_pretrain"])  # its imports are paid once
        self.result = result
        self.pipe, theirs = context.Pipe()
        given = (theirs, variant, argv, data, time.time())
        self.process = context.Process(target=train_variant, args=given)
        self.process.start()
        theirs.close()

    def hear(self) -> dict | None:
        """What it did; None if it ended before its time, which is said."""
        with contextlib.suppress(EOFError, ConnectionError):
            said = self.pipe.recv()
            if "ended" not in said:
                return said
        self.process.join()
        print(f"{self.result['name']}: failed, the cause is above", file=sys.stderr)
        return None


def preset_data(preset: str) -> list[str]:
    """The preset's own corpus."""
    from trainer.flags import PRESETS, DataFlags

    return PRESETS[preset].get("data_path", DataFlags().data_path)


def table(args: argparse.Namespace, results: list[dict]) -> str:
    """Markdown; speeds are medians over turns, with the lowest and highest."""
    import torch

    from trainer.metrics import peak_flops

    peak = peak_flops(torch.device(args.device))
    base = next((r for r in results if r["name"] == "padded recipe" and r["turns"]), None)
    base_speed = base and statistics.median(t["tokens"] / t["seconds"] for t in base["turns"])
    lines = [
        "| variant | useful tokens/s | lowest to highest | times the padded | useful share | MFU "
        "| waiting for data | peak memory | to the first update | of it compiling, first pass |",
        "|---|---|---|---|---|---|---|---|---|---|",
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
            f"| {total['waited'] / total['seconds']:.1%} | {result['memory'] / 2**30:.2f} GiB "
            f"| {start} | {result['first_step']:.1f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", nargs="+", default=["demo"])
    parser.add_argument("--device", default=None, help="cuda, mps or cpu; None: the best there is")
    parser.add_argument("--data_path", nargs="+", help="None: the preset's")
    parser.add_argument("--turns", type=int, default=3, help="of each variant")
    parser.add_argument("--seconds", type=float, help="of one turn")
    parser.add_argument("--only", nargs="+", help="variants whose names contain one of these")
    parser.add_argument("--json", help="file for all that was measured")
    args = parser.parse_args()
    from scripts.measuring import surroundings
    from trainer.device import default_device

    args.device = args.device or default_device()
    print(surroundings(args, "scripts/benchmark.py"))
    found = {}
    for preset in args.preset:
        found[preset] = measure(args, preset)
        print(f"\n--preset {preset}\n\n{table(args, found[preset])}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
