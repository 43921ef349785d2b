"""What a run says of itself: a console line, the same numbers as JSONL, and to the tracker."""

import contextlib
import json
import math
import time
from collections.abc import Generator
from pathlib import Path

import torch
from tqdm import tqdm

from model.model_minimind import MiniMindConfig
from trainer import distributed
from trainer.checkpoint import checkpoint_name, write_atomically
from trainer.console import log
from trainer.describe import cost, run_time
from trainer.distributed import is_main_process
from trainer.flags import TrainConfig
from trainer.guard.tracker import NoTracker, SwanLabTracker
from trainer.plan import NOT_KNOWN
from trainer.run import Run
from trainer.step_times import bottleneck, shares
from trainer.weights import get_model_params

# Dense bfloat16 with float32 accumulation, operations a second, by a part of the device's name; the
# first that fits counts. NVIDIA's data sheets; where they name the sparse figure, half of it.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209e12,
    "RTX 4090 D": 147e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


OVERFITTING = 0.05  # nats above the best held-out loss, from where on it is told


def flops_per_token(config: MiniMindConfig, active_parameters: int, row_length: int) -> float:
    """Operations of one token's forward and backward pass, in rows of ``row_length``.

    Six per weight that the token meets (the tied matrix once, as the head); for attention twelve
    per layer, head width and token seen; causal, so half a row is seen on average.

    Source: PaLM (Chowdhery et al. 2022), appendix B."""
    width = config.num_attention_heads * config.head_dim
    return 6 * active_parameters + 12 * config.num_hidden_layers * width * row_length / 2


def peak_flops(device: torch.device) -> float | None:
    """What the device could do at best, or None for one we have no data sheet of."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def metrics_path(args: TrainConfig, config: MiniMindConfig) -> Path:
    """``out/pretrain_768_metrics.jsonl``."""
    return Path(args.save_dir) / f"{checkpoint_name(args.save_weight, config)}_metrics.jsonl"


def complete_files(run: Run) -> None:
    """What a kill after the last state may have kept from being written: metrics and weights."""
    restore_file(metrics_path(run.args, run.config), run.records)
    run.export()


def restore_file(path: Path, records: list[dict]) -> None:
    """Make the metrics file hold these records and no others; untouched if it does already."""
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    if not path.exists() or path.read_bytes() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def open_metrics(run: Run) -> "Metrics":
    """The log of a run, with its tracker if there is to be one."""
    config = run.args
    metrics = Metrics(metrics_path(config, run.config), run)
    if config.use_wandb and is_main_process():
        metrics.tracker = SwanLabTracker(
            config.wandb_project,
            config.save_weight,
            config=vars(config),
            log_dir=f"{config.save_dir}/swanlog",
            run_id=run.tracker_id,
            history=run.records,
        )
    return metrics


class Metrics:
    """Writes on the main process only. After a resume the file continues where the state was saved.

    Args:
        path: the JSONL file, one record an interval and one an evaluation. The run's state holds
            the same records, so that neither a kill nor a lost disk leaves a gap or a double.
        run: what is measured."""

    def __init__(self, path: Path, run: Run) -> None:
        self.path, self.run = path, run
        self.tracker: NoTracker | SwanLabTracker = NoTracker(run.tracker_id)  # its id is kept
        _, active = get_model_params(run.model, run.config)
        self.flops_per_token = flops_per_token(run.config, active, run.args.max_seq_len)
        peak = peak_flops(run.device)
        self.peak_flops = peak and peak * distributed.world_size()
        if is_main_process():
            restore_file(path, run.records)
        self.bar = tqdm(
            total=None if run.total_rows == NOT_KNOWN else run.total_rows,
            initial=run.rows_seen,
            unit="row",
            desc="training",
            dynamic_ncols=True,
            disable=None if is_main_process() else True,  # None: shown on a terminal only
        )
        self.last_save, self.told_rows = time.monotonic(), 0
        run.times.restart()
        self.advised: set[str] = set()  # parts of a step that were named as too slow
        self._start_interval()

    def _start_interval(self) -> None:
        self.since = time.monotonic()
        self.seconds_paused = 0.0
        self.num_rows, self.num_tokens = 0, 0

    def count(self, num_rows: int, num_tokens: int) -> None:
        """One update is done: so many rows, so many tokens learnt from."""
        self.num_rows += num_rows
        self.num_tokens += num_tokens
        self.bar.update(num_rows)

    @contextlib.contextmanager
    def outside_training(self, part: str) -> Generator[None]:
        """What happens inside does not count as training time, but as this part of a step's."""
        since = time.monotonic()
        yield
        seconds = time.monotonic() - since
        self.seconds_paused += seconds
        if self.run.budget:
            self.run.budget.pause(part, seconds)
        self.run.times.mark(part)

    def saved(self, seconds: float) -> None:
        """A save stopped training for so long."""
        now = time.monotonic()
        share = seconds / max(now - self.last_save, 1e-9)
        costly = share > 0.02 and self.run.step % self.run.args.save_interval == 0
        advice = "; a larger --save_interval costs less" if costly else ""
        self.last_save, self.seconds_to_save = now, seconds
        log(
            f"saved update {self.run.step:,} in {seconds:.2f} s: {share:.1%} of the time "
            f"since the last save{advice}"
        )

    def plan_changed(self) -> None:
        """Log the plan when it first appears or moves by more than 10 %."""
        run, minutes = self.run, self.run.args.max_minutes
        self.bar.total = run.total_rows
        if minutes is not None and abs(run.total_rows - self.told_rows) > 0.1 * run.total_rows:
            self.told_rows = run.total_rows
            updates = run.step + math.ceil((run.total_rows - run.rows_seen) / run.global_batch)
            tokens = run.total_rows * run.args.max_seq_len
            log(
                f"plan: {updates:,} updates, {tokens:,} tokens, {run.num_epochs} passes over the "
                f"data end within {minutes:g} minutes{cost(run.args, minutes)}"
            )

    def stopped(self, received: str | None) -> str:
        """The last line of a run that a signal stopped."""
        who = f"{received} received" if received else "another rank received a signal"
        return f"stopping: {who}, saved update {self.run.step:,} in {self.seconds_to_save:.1f} s"

    def interval(self, lr: float) -> None:
        """Report the interval that ends now; waits for the device."""
        grad_norm, load = self.run.read_outcomes()
        losses = self.run.close_interval()
        run, seconds = self.run, time.monotonic() - self.since
        speed = self.num_tokens / max(seconds - self.seconds_paused, 1e-9)
        minutes_left = (run.total_rows - run.rows_seen) * seconds / max(self.num_rows, 1) / 60
        if run.budget:
            minutes_left = max(0.0, run.budget.seconds - run.budget.spent()) / 60
        epoch = -(-run.rows_seen // run.rows_per_epoch)
        epochs = "?" if run.total_rows == NOT_KNOWN else run.num_epochs
        record = {
            "step": run.step,
            "epoch": epoch,
            "rows": run.rows_seen,
            "tokens": run.progress.tokens_seen,
        }
        record |= {**losses, "lr": lr}
        if grad_norm is not None and math.isfinite(grad_norm):
            record["grad_norm"] = grad_norm
        record |= {f"load_expert_{i}": round(share, 4) for i, share in enumerate(load)}
        if run.progress.bad_updates:
            record["bad_updates"] = run.progress.bad_updates
        record |= {"tokens_per_second": round(speed), "eta_minutes": round(minutes_left, 2)}
        if run.budget:
            record["minutes_spent"] = round(run.budget.spent() / 60, 3)
        parts = shares(run.times.read())
        record |= {f"share_{part}": round(share, 4) for part, share in parts.items()}
        shown = "".join(f"  {name} {value:.4f}" for name, value in losses.items())
        if load:
            shown += f"  experts {' '.join(f'{share:.0%}' for share in load)}"
        mfu = ""
        if self.peak_flops:
            record["mfu"] = round(speed * self.flops_per_token / self.peak_flops, 4)
            mfu = f"  mfu {record['mfu']:.1%}"
        self.write(record)
        log(
            f"epoch {epoch}/{epochs}  step {run.step:>5}{shown}  lr {lr:.2e}  "
            f"grad_norm {record.get('grad_norm', math.nan):.3f}  {speed:,.0f} tokens/s{mfu}  "
            f"{minutes_left:.1f} min left"
            + "".join(f"  {part} {share:.0%}" for part, share in parts.items() if share >= 0.01)
        )
        if (advice := bottleneck(parts)) and advice[0] not in self.advised:
            self.advised.add(advice[0])
            log(f"note: {advice[1]}")
        self._start_interval()

    def evaluation(self, scores: dict[str, float], texts: dict[str, str]) -> None:
        """Report held-out loss and continuations of fixed prompts."""
        before = [r["heldout_loss"] for r in self.run.records if "heldout_loss" in r]
        self.write({"step": self.run.step, **scores, "continuations": texts})
        if scores:
            log(
                f"held out: loss {scores['heldout_loss']:.4f}, "
                f"{scores['heldout_bits_per_byte']:.4f} bits/byte"
                + "".join(
                    f", {name.removeprefix('heldout_bits_per_byte_')} {score:.4f}"
                    for name, score in scores.items()
                    if name.startswith("heldout_bits_per_byte_")
                )
            )
            if scores["heldout_loss"] > min(before, default=math.inf) + OVERFITTING:
                log(
                    f"warning: the held-out loss was {min(before):.4f} and rises: the model learns "
                    f"the training text by heart. More data helps, or fewer --epochs"
                )
        for prompt, text in texts.items():
            log(f"  {prompt} → {text}".replace("\n", "⏎"))

    def write(self, record: dict) -> None:
        """Append one record to the file and send its numbers to the tracker."""
        if is_main_process():
            self.run.records.append(record)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.tracker.log(record, step=record["step"])

    def close(self) -> None:
        """The run is complete."""
        self.bar.close()
        self.tracker.finish()
        minutes = (self.run.budget.spent() if self.run.budget else run_time()) / 60
        if self.run.budget or self.run.args.price_per_hour is not None:
            log(f"spent {minutes:.2f} minutes{cost(self.run.args, minutes)}")
