"""Metrics of a run: printed on the console, appended to a JSONL file, and sent to the tracker."""

import contextlib
import json
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.model_minimind import MiniMindConfig
from trainer import distributed
from trainer.checkpoint import checkpoint_name, list_states, update_of, write_atomically
from trainer.console import log
from trainer.describe import cost
from trainer.distributed import is_main_process
from trainer.fast_paths import ROWS_ON_DEVICE
from trainer.flags import TrainConfig
from trainer.forecast import PAIRS, described, forecast_of, score_of_pairs
from trainer.host import run_time
from trainer.plan import NOT_KNOWN
from trainer.reading import open_regular
from trainer.run import Run
from trainer.step_times import bottleneck, shares
from trainer.tracker import NoTracker, SwanLabTracker
from trainer.weights import get_model_params

# Peak dense bfloat16 FLOP/s with float32 accumulation, by a part of the device's name; the first
# match counts. From NVIDIA's data sheets; where they give only the sparse figure, half of it.
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

MAX_RECORDS = 20_000  # in the metrics file; about 5 MB, also of each state
OVERFITTING_NATS = 0.05  # per token: held-out loss this far above its minimum causes a warning


def flops_per_token(config: MiniMindConfig, active_parameters: int, row_length: int) -> float:
    """FLOPs of the forward and backward pass for one token, in rows of ``row_length`` tokens.

    Six per weight that the token is multiplied by (an embedding counts if it is also the output
    head), and twelve per layer, attention dimension and visible token: on average half a row, as
    attention is causal.

    Source: PaLM (Chowdhery et al. 2022), appendix B."""
    width = config.num_attention_heads * config.head_dim
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return (
        6 * (active_parameters - looked_up) + 12 * config.num_hidden_layers * width * row_length / 2
    )


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s; None if PEAK_FLOPS does not list it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def metrics_path(args: TrainConfig, config: MiniMindConfig) -> Path:
    """``out/pretrain_768_metrics.jsonl``."""
    return Path(args.save_dir) / f"{checkpoint_name(args.save_weight, config)}_metrics.jsonl"


def complete_files(run: Run) -> None:
    """Write the metrics and weights that a kill after the last state may have prevented, and remove
    the states that its save would have removed."""
    args = run.args
    restore_file(metrics_path(args, run.config), run.records)
    run.export()
    name = checkpoint_name(args.save_weight, run.config)
    for old in list_states(args.checkpoint_dir, name)[args.keep_states :]:
        if update_of(old) < run.step:
            old.unlink(missing_ok=True)


def restore_file(path: Path, records: list[dict]) -> None:
    """Make the metrics file hold exactly these records; leave it alone if it already does."""
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    if not is_content(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def thinned(records: list[dict]) -> list[dict]:
    """Every second line of the older half, and all that tell a held-out loss.

    Each state holds the records: without an end to them, saves would take ever longer."""
    half = len(records) // 2
    older = (r for i, r in enumerate(records[:half]) if i % 2 == 0 or "heldout_loss" in r)
    return [*older, *records[half:]]


def is_content(path: Path, data: bytes) -> bool:
    """Whether a file holds these bytes."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        return file.read(len(data) + 1) == data
    return False


def open_metrics(run: Run) -> "Metrics":
    """The metrics of a run, with a tracker if ``--use_wandb`` asks for one."""
    config = run.args
    metrics = Metrics(metrics_path(config, run.config), run)
    if config.use_wandb and is_main_process():
        metrics.tracker = SwanLabTracker(
            config.wandb_project,
            config.save_weight,
            config={k: v for k, v in vars(config).items() if k != "program"},
            log_dir=f"{config.save_dir}/swanlog",
            run_id=run.tracker_id,
            history=run.records,
        )
    return metrics


def told(score: tuple[str, float]) -> str:
    """A held-out score, as on the console."""
    name, value = score[0].removeprefix("heldout_"), score[1]
    if name == "bits_per_byte":
        return f"{value:.4f} bits/byte"
    return f"{name.removeprefix('bits_per_byte_').replace('_', ' ')} {value:.4f}"


class Metrics:
    """Logs a run. Only the main process writes.

    Args:
        path: the JSONL file, one record per log interval and one per evaluation. The run's state
            holds the same records, so neither a kill nor a lost disk leaves gaps or duplicates.
        run: the run to log."""

    def __init__(self, path: Path, run: Run) -> None:
        self.path, self.run = path, run
        # The id of the run's tracker is kept even if this start does not use it.
        self.tracker: NoTracker | SwanLabTracker = NoTracker(run.tracker_id)
        _, active = get_model_params(run.model, run.config)
        self.flops_per_token = flops_per_token(run.config, active, run.args.row_length)
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
            disable=None if is_main_process() else True,  # None: enabled only on a terminal
        )
        self.last_save_time, self.seconds_to_save = time.monotonic(), 0.0
        self.logged_total_rows = 0  # of the last plan that was logged
        run.times.restart()
        self.reported_parts: set[str] = set()  # parts of a step already reported as too slow
        self._start_interval()

    def _start_interval(self) -> None:
        self.interval_start = time.monotonic()
        self.seconds_paused = 0.0
        self.num_rows, self.num_tokens = 0, 0

    def add_update(self, num_rows: int, num_tokens: int) -> None:
        """Count an update that consumed ``num_rows`` and learned from ``num_tokens``."""
        self.num_rows += num_rows
        self.num_tokens += num_tokens
        self.bar.update(num_rows)

    @contextlib.contextmanager
    def outside_training(self, part: str) -> Generator[None]:
        """Time spent inside counts as this part of a step, and not toward the training speed."""
        since = time.monotonic()
        yield
        seconds = time.monotonic() - since
        self.seconds_paused += seconds
        if self.run.budget:
            self.run.budget.pause(part, seconds)
        self.run.times.mark(part)

    def log_save(self, seconds: float) -> None:
        """Log a save that took ``seconds``, and its share of the time since the last one."""
        now = time.monotonic()
        share = seconds / max(now - self.last_save_time, 1e-9)
        costly = share > 0.02 and self.run.step % self.run.args.save_interval == 0
        advice = "; a larger --save_interval costs less" if costly else ""
        self.last_save_time, self.seconds_to_save = now, seconds
        log(
            f"saved update {self.run.step:,} in {seconds:.2f} s: {share:.1%} of the time "
            f"since the last save{advice}"
        )

    def log_plan(self) -> None:
        """Log the plan of a run with a time budget, if it is new or has changed by over 10 %."""
        run, minutes = self.run, self.run.args.max_minutes
        self.bar.total = run.total_rows
        changed_rows = abs(run.total_rows - self.logged_total_rows)
        if minutes is not None and changed_rows > 0.1 * run.total_rows:
            self.logged_total_rows = run.total_rows
            updates = run.step + math.ceil((run.total_rows - run.rows_seen) / run.global_batch)
            tokens = run.total_rows * run.args.row_length
            log(
                f"plan: {updates:,} updates, {tokens:,} tokens, {run.num_epochs} passes over the "
                f"data, to end within {minutes:g} minutes{cost(run.args, minutes)}"
            )

    def log_interval(self, lr: float) -> None:
        """Log the interval that ends now. Waits for the device."""
        run, budget = self.run, self.run.budget
        grad_norm, load = run.read_outcomes()
        losses = run.close_interval()
        seconds = time.monotonic() - self.interval_start
        speed = self.num_tokens / max(seconds - self.seconds_paused, 1e-9)
        minutes_left = (run.total_rows - run.rows_seen) * seconds / max(self.num_rows, 1) / 60
        if budget:
            minutes_left = max(0.0, budget.seconds - budget.spent()) / 60
        epoch = -(-run.rows_seen // run.rows_per_epoch)
        epochs = "?" if run.total_rows == NOT_KNOWN else run.num_epochs
        if grad_norm is not None and not math.isfinite(grad_norm):
            grad_norm = None
        norm_text = f"grad_norm {math.nan if grad_norm is None else grad_norm:.3f}"
        mfu, mfu_text = None, ""
        unit = run.args.program.unit
        if self.peak_flops and unit == "tokens":
            mfu = round(speed * self.flops_per_token / self.peak_flops, 4)
            mfu_text = f"mfu {mfu:.1%}"
        experts = f"experts {' '.join(f'{share:.0%}' for share in load)}" if load else ""
        parts = shares(run.times.read())
        # Each number's name, its value in the file (None: not written) and its text on the console.
        numbers: list[tuple[str, float | None, str]] = [
            ("step", run.step, f"epoch {epoch}/{epochs}  step {run.step:>5}"),
            ("epoch", epoch, ""),
            ("rows", run.rows_seen, ""),
            ("progress", self.share_done(), ""),
            (unit, run.progress.tokens_seen, ""),
            *((name, loss, f"{name} {loss:.4f}") for name, loss in losses.items()),
            ("experts", None, experts),
            ("lr", lr, f"lr {lr:.2e}"),
            ("grad_norm", grad_norm, norm_text),
            *((f"load_expert_{i}", round(share, 4), "") for i, share in enumerate(load)),
            ("bad_updates", run.progress.bad_updates or None, ""),
            (f"{unit}_per_second", round(speed), f"{speed:,.0f} {unit}/s"),
            ("", None, mfu_text),
            ("eta_minutes", round(minutes_left, 2), f"{minutes_left:.1f} min left"),
            ("minutes_spent", round(budget.spent() / 60, 3) if budget else None, ""),
            *(
                (f"share_{part}", round(share, 4), f"{part} {share:.0%}" if share >= 0.01 else "")
                for part, share in parts.items()
            ),
            ("mfu", mfu, ""),
        ]
        self.write({name: value for name, value, _ in numbers if value is not None})
        log("  ".join(text for *_, text in numbers if text))
        if run.fast_paths.get(ROWS_ON_DEVICE) == "used":
            parts.pop("data", None)  # there is nothing that the advice could mend
        if (advice := bottleneck(parts)) and advice[0] not in self.reported_parts:
            self.reported_parts.add(advice[0])
            log(f"note: {advice[1]}")
        self._start_interval()

    def log_pairs(self, held_out: Any | None) -> None:
        """Log what the counts that the model began with, if it did, score on the held-out rows."""
        score = score_of_pairs(self.run, held_out)
        if self.run.pairs is not None and score is not None:
            self.write({"step": self.run.step, PAIRS: score})
            log(f"held out: {score:.4f} bits/byte by counts of neighbouring tokens alone")
        self.run.pairs = None  # large

    def log_evaluation(
        self, scores: dict[str, float], texts: dict[str, str], repeated: float | None = None
    ) -> None:
        """Log held-out scores, if any, continuations by prompt, and how much these repeat."""
        run = self.run
        past = [(r["heldout_loss"], r["step"]) for r in run.records if "heldout_loss" in r]
        lowest, lowest_step = min(past, default=(math.inf, 0))
        has_risen = scores.get("heldout_loss", -math.inf) > lowest + OVERFITTING_NATS
        memorizes = has_risen and run.rows_seen > run.rows_per_epoch
        record = {"step": run.step, "progress": self.share_done(), **scores}
        expected = forecast_of(run, record) if scores and not memorizes else None
        if expected:
            record |= {f"forecast_{k}": round(v, 4) for k, v in expected._asdict().items()}
        share = {} if repeated is None else {"repeated_4grams": round(repeated, 4)}
        self.write(record | share | {"continuations": texts})
        if scores:
            log(f"held out: {', '.join(map(told, scores.items()))}")
        if has_risen:
            passes = lowest_step * run.global_batch / run.rows_per_epoch
            reason = (
                "a high rate undoes what was learnt, as of a start from counts. If the loss does "
                "not fall again with the rate, lower --learning_rate"
            )
            if memorizes:
                reason = (
                    f"the model is memorizing it. Use more text, a larger --weight_decay, or "
                    f"--epochs {max(1, round(passes))}; see docs/RECIPES.md"
                )
            log(
                f"warning: the held-out loss has risen from {lowest:.4f}, after {passes:.1f} "
                f"passes over the text: {reason}"
            )
        if expected:
            log(f"forecast: {described(expected)}")
        for prompt, text in texts.items():
            log(f"  {prompt} → {text}".replace("\n", "⏎"))
        if repeated is not None:
            log(f"  {repeated:.0%} of their 4-grams are repeated")

    def share_done(self) -> float:
        """The share of the run that is done, by its plan; 0 while none is known."""
        run = self.run
        return 0.0 if run.total_rows == NOT_KNOWN else round(run.plan.share(run.rows_seen), 4)

    def write(self, record: dict) -> None:
        """Append a record to the file, and send its numbers to the tracker."""
        if is_main_process():
            self.run.records.append(record)
            if len(self.run.records) > MAX_RECORDS:
                self.run.records[:] = thinned(self.run.records)
                restore_file(self.path, self.run.records[:-1])
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.tracker.log(record, step=record["step"])

    def close(self) -> None:
        """Close the progress bar and the tracker, and log the time and money spent."""
        self.bar.close()
        self.tracker.finish()
        minutes = (self.run.budget.spent() if self.run.budget else run_time()) / 60
        if self.run.budget or self.run.args.price_per_hour is not None:
            log(f"spent {minutes:.2f} minutes{cost(self.run.args, minutes)}")
