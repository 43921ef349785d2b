"""What a run prints before training: sizes, likely mistakes, estimated time and cost."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from trainer import distributed
from trainer.console import log
from trainer.device import gpu_has_bfloat16
from trainer.flags import TrainConfig
from trainer.forecast import forecast_before
from trainer.host import peak_memory, run_time
from trainer.muon import moments_of
from trainer.plan import GENERATION, SKIPPED
from trainer.progress import Outcome
from trainer.run import Run
from trainer.saved_settings import description_of
from trainer.weights import get_model_params

DRY_RUN_UPDATES = 7

# Thresholds for warnings. The learning rates are for a width of 256 (measured in docs/LOG.md)
# and taken to be inversely proportional to it. The others are rules of thumb; up to four epochs
# teach nearly as much as new data (Muennighoff et al. 2023).
MAX_RATE, WARMUP_RATE, MIN_UPDATES, MAX_EPOCHS = 1e-2, 2e-3, 200, 4


def describe_run(run: Run, corpus: dict, num_held_out: int) -> None:
    """Print the sizes that follow from the flags, and warn of likely mistakes.

    Args: corpus: counts from the token cache; num_held_out: documents."""
    total, active = get_model_params(run.model, run.config)
    size = f"{total / 1e6:.2f}M" + (f"-A{active / 1e6:.2f}M" if active < total else "")
    vocab_size, length = run.config.vocab_size, run.args.row_length
    expected = "near" if run.args.embedding_init == "random" else "well below"
    if run.args.from_weight == "none":
        expected = (
            f"the first loss should be {expected} ln {vocab_size} = {math.log(vocab_size):.2f}"
        )
    else:
        expected = f"begins as {run.args.from_weight}"
    log(
        f"model: {size} parameters, vocabulary {vocab_size:,}: {expected}; "
        f"{memory_of_weights(run.optimizer) / 2**30:.2f} GiB with gradients and moments"
    )
    held_out, dropped = f"{num_held_out:,} held out", f"dropped {corpus['num_empty']:,} empty ones"
    if labels := corpus.get("num_labels"):
        texts = corpus.get("num_texts", 0)
        mixed = f" and {texts:,} texts" if texts else ""
        log(
            f"data: {corpus['num_documents'] - texts:,} {run.args.program.documents}{mixed}, "
            f"{corpus['num_tokens']:,} tokens, {labels / corpus['num_tokens']:.0%} of them "
            f"learned; {held_out}; {dropped}"
        )
    else:
        log(
            f"data: {corpus['num_documents']:,} documents, {corpus['num_tokens']:,} tokens, "
            f"{corpus['num_bytes'] / corpus['num_tokens']:.2f} bytes per token; "
            f"{num_held_out:,} documents held out; {dropped}, "
            f"found {corpus['num_control_tokens']:,} control tokens in the text"
        )
    if corpus.get("num_bad"):
        log(
            f"warning: skipped {corpus['num_bad']:,} bad records; the first: "
            f"{corpus['bad_examples'][0]}"
        )
    updates = math.ceil(run.rows_per_epoch / run.global_batch) * run.args.epochs
    epochs, length_of_run = f"{run.args.epochs} x ", f"in {updates:,} updates"
    if run.budget:
        epochs = ""
        length_of_run = f"as often as fits into {run.args.max_minutes:g} minutes, in updates"
    tokens = run.rows_per_epoch * length * run.args.epochs
    log(
        f"run: {epochs}{run.rows_per_epoch:,} rows of {length} tokens {length_of_run} of "
        f"{run.global_batch:,} rows ({run.global_batch * length:,} tokens) "
        f"on {distributed.world_size()} x {run.device.type}, {run.args.dtype}"
        + (f"; {tokens / total:.1f} tokens per parameter" if not run.budget else "")
    )
    warnings = likely_mistakes(run.args, updates, run.global_batch)
    if has_other_tokenizer(run):
        warnings.append(
            f"{run.args.from_weight} was trained with another tokenizer, so it has not learnt what "
            f"these tokens mean. Use that one: --tokenizer_path"
        )
    for warning in warnings:
        log(f"warning: {warning}")


def likely_mistakes(args: TrainConfig, updates: int, global_batch: int) -> list[str]:
    """A warning for each unusual setting that often spoils a run; empty if there is none."""
    warnings = []
    max_rate = MAX_RATE * 256 / args.hidden_size
    if args.learning_rate > max_rate:
        warnings.append(
            f"--learning_rate {args.learning_rate:g} is high for a width of {args.hidden_size}: "
            f"above {max_rate:.1g} such models often diverge"
        )
    rate = pretraining_rate(args)
    if args.program.is_chat and rate is not None and args.learning_rate >= rate:
        warnings.append(
            f"--learning_rate {args.learning_rate:g} is as high as in pretraining ({rate:g}): "
            f"fine-tuning at it forgets much and answers no better, see docs/CHAT.md"
        )
    no_warmup = args.optimizer == "adamw" and args.warmup_ratio == 0
    if no_warmup and args.learning_rate >= WARMUP_RATE * 256 / args.hidden_size:
        warnings.append(
            f"AdamW at --learning_rate {args.learning_rate:g} without a warm-up wastes many of its "
            f"first updates: --warmup_ratio 0.05 helps"
        )
    if args.max_minutes is None and updates < MIN_UPDATES and global_batch > 8:
        warnings.append(
            f"only {updates:,} updates: a model learns little in fewer than {MIN_UPDATES:,}. A "
            f"lower --accumulation_steps or --batch_size makes more updates of the same rows"
        )
    if args.max_minutes is None and args.epochs > MAX_EPOCHS:
        warnings.append(
            f"{args.epochs} passes over the data: from the fifth on, they teach little, and the "
            f"held-out loss may rise"
        )
    return warnings


def has_other_tokenizer(run: Run) -> bool:
    """Whether --from_weight was trained with another one, if the ``.json`` beside it tells."""
    name = "content of tokenizer_path"
    try:
        return description_of(run.args)["run"]["settings"][name] != run.settings[name]
    except (LookupError, TypeError):
        return False


def pretraining_rate(args: TrainConfig) -> float | None:
    """The learning rate of the run that made --from_weight, if it is known and of this optimizer's
    kind."""
    try:
        before = description_of(args)["run"]["settings"]
        same = before["optimizer"] == args.optimizer
        return float(before["learning_rate"]) if same else None
    except (LookupError, TypeError, ValueError):
        return None


def memory_of_weights(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the float32 weights, gradients and moments, without activations."""
    return sum(
        4 * sum(t.numel() for t in (p, p, *moments_of(group, p).values()))
        for group in optimizer.param_groups
        for p in group["params"]
    )


def describe_pass(run: Run) -> None:
    """Print the micro-batch and how it is computed, as chosen by flags or for the device."""
    attention, memory = "within documents" if run.model.attends_within else "by mask", ""
    if run.device.type == "cuda":  # a trial pass has set the peak
        peak_gib = torch.cuda.max_memory_allocated(run.device) / 2**30
        total_gib = torch.cuda.get_device_properties(run.device).total_memory / 2**30
        memory = f", {peak_gib:.1f} of {total_gib:.1f} GiB"
        if run.args.dtype == "float16" and not gpu_has_bfloat16(run.device):
            log("note: this GPU lacks bfloat16: using float16 with gradient scaling")
    log(
        f"pass: {run.micro_batch:,} rows, {run.rows_per_device // run.micro_batch} passes per "
        f"update, {'compiled' if run.args.use_compile else 'eager'}, attention {attention}{memory}"
    )


def cost(args: TrainConfig, minutes: float) -> str:
    """The machine's cost, as the end of a message; empty if no price was given."""
    if args.price_per_hour is None:
        return ""
    return f", {minutes / 60 * args.price_per_hour:,.2f} at {args.price_per_hour:g} per hour"


def report_dry_run(
    run: Run,
    held_out: Any | None,
    windows: Iterable[tuple[list, int]],
    step: Callable[[Run, list, int], Outcome],
) -> None:
    """--dry_run 1: estimate time, memory, cost and loss of the whole run, from a few updates and
    from the text.

    Args: held_out: the dataset of those rows; windows: each update's batches, made when asked
        for; step: makes the update."""
    seconds, since = [], time.monotonic()
    for window, _ in itertools.islice(windows, DRY_RUN_UPDATES):
        num_labels = distributed.totals(sum(batch.num_labels for batch in window))[0]
        step(run, window, int(num_labels)).grad_norm.item()  # waits for the device
        seconds.append(time.monotonic() - since)
        since = time.monotonic()
    measured = seconds[SKIPPED:] or seconds
    update_seconds = statistics.median(measured)
    startup_seconds = run_time() - len(seconds) * update_seconds  # includes compilation
    tokens = run.global_batch * run.args.row_length
    evaluation_seconds = run.evaluation_updates * update_seconds + GENERATION
    if run.budget:
        seconds_left = run.budget.seconds - startup_seconds - evaluation_seconds
        per_update = update_seconds + evaluation_seconds / run.args.eval_interval
        updates = max(1, int(seconds_left / per_update))
    else:
        updates = math.ceil(run.rows_per_epoch / run.global_batch) * run.args.epochs
    evaluations = math.ceil(updates / run.args.eval_interval)
    minutes = (startup_seconds + updates * update_seconds + evaluations * evaluation_seconds) / 60
    peak_bytes = peak_memory()
    if run.device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(run.device)
    total, _ = get_model_params(run.model, run.config)
    log(
        f"dry run: {update_seconds:.3f} s per update (median of {len(measured)}), "
        f"{tokens / update_seconds:,.0f} tokens/s, peak memory {peak_bytes / 2**30:.2f} GiB\n"
        f"dry run: {updates:,} updates, {updates * tokens:,} tokens, "
        f"{updates * tokens / total:.1f} per parameter, in {minutes:.1f} minutes"
        f"{cost(run.args, minutes)}; includes {evaluations:,} evaluations, but no saves"
    )
    if held_out is not None and distributed.is_main_process():
        log(f"dry run: {forecast_before(run, held_out, updates * tokens)}")
