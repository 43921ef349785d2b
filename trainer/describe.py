"""What a run tells before it begins: sizes, usual mistakes, time and cost."""

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable

import torch

from trainer import distributed
from trainer.console import log
from trainer.device import card_has_bfloat16
from trainer.flags import TrainConfig
from trainer.optimizer import moments_of
from trainer.plan import GENERATION, SKIPPED, process_start
from trainer.progress import Outcome
from trainer.run import Run
from trainer.weights import get_model_params

DRY_RUN_UPDATES = 7  # updates of a dry run

# Where to warn. Rates: at a width of 256, taken to go inversely with it; docs/RECIPES.md has what
# was measured there. The others are rules of thumb; epochs: up to four passes teach nearly as much
# as new data (Muennighoff et al. 2023).
HIGHEST_RATE, WARM_UP_RATE, FEWEST_UPDATES, MOST_EPOCHS = 1e-2, 2e-3, 200, 4


def describe_run(run: Run, corpus: dict, num_held_out: int) -> None:
    """Print the numbers that follow from the flags, so that they can be checked by eye.

    Args: corpus: the token cache's counts."""
    total, active = get_model_params(run.model, run.config)
    size = f"{total / 1e6:.2f}M" + (f"-A{active / 1e6:.2f}M" if active < total else "")
    vocab_size, length = run.config.vocab_size, run.args.max_seq_len
    log(
        f"model: {size} parameters, vocabulary {vocab_size:,}: "
        f"the first loss should be near ln {vocab_size} = {math.log(vocab_size):.2f}; "
        f"{memory_of_weights(run.optimizer) / 2**30:.2f} GiB with gradients and moments"
    )
    log(
        f"data: {corpus['num_documents']:,} documents, {corpus['num_tokens']:,} tokens, "
        f"{corpus['num_bytes'] / corpus['num_tokens']:.2f} bytes a token; "
        f"{num_held_out:,} documents held out; dropped {corpus['num_empty']:,} empty ones, "
        f"found {corpus['num_control_tokens']:,} control tokens in the text"
    )
    if corpus.get("num_bad"):
        log(
            f"warning: passed over {corpus['num_bad']:,} bad records; the first: "
            f"{corpus['bad_examples'][0]}"
        )
    updates = math.ceil(run.rows_per_epoch / run.global_batch) * run.args.epochs
    epochs, in_all = f"{run.args.epochs} x ", f"in {updates:,} updates"
    if run.budget:
        epochs, in_all = "", f"as often as fit into {run.args.max_minutes:g} minutes, in updates"
    tokens = run.rows_per_epoch * length * run.args.epochs
    log(
        f"run: {epochs}{run.rows_per_epoch:,} rows of {length} tokens {in_all} of "
        f"{run.global_batch:,} rows ({run.global_batch * length:,} tokens) "
        f"on {distributed.world_size()} x {run.device.type}, {run.args.dtype}"
        + (f"; {tokens / total:.1f} tokens a parameter" if not run.budget else "")
    )
    for warning in usual_mistakes(run.args, updates, run.global_batch):
        log(f"warning: {warning}")


def usual_mistakes(args: TrainConfig, updates: int, global_batch: int) -> list[str]:
    """What people regret after a run, in words; empty if nothing is unusual."""
    found = []
    highest = HIGHEST_RATE * 256 / args.hidden_size
    if args.learning_rate > highest:
        found.append(
            f"--learning_rate {args.learning_rate:g} is high for a width of {args.hidden_size}: "
            f"above {highest:.1g} such models often diverge"
        )
    needs_warm_up = args.optimizer == "adamw" and args.warmup_ratio == 0
    if needs_warm_up and args.learning_rate >= WARM_UP_RATE * 256 / args.hidden_size:
        found.append(
            f"AdamW at --learning_rate {args.learning_rate:g} without a warm-up loses much of its "
            f"first updates: --warmup_ratio 0.05 helps"
        )
    if args.max_minutes is None and updates < FEWEST_UPDATES and global_batch > 8:
        found.append(
            f"only {updates:,} updates: a model learns little in fewer than {FEWEST_UPDATES:,}. A "
            f"lower --accumulation_steps or --batch_size makes more of the same rows"
        )
    if args.max_minutes is None and args.epochs > MOST_EPOCHS:
        found.append(
            f"{args.epochs} passes over the data: from the fifth on they teach little, and the "
            f"held-out loss may rise"
        )
    return found


def memory_of_weights(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the weights, their gradients and the optimizer's moments: one of Muon, two of AdamW;
    float32 all. What a pass keeps comes on top."""
    return sum(
        p.numel() * 4 * (2 + len(moments_of(group)))
        for group in optimizer.param_groups
        for p in group["params"]
    )


def describe_pass(run: Run) -> None:
    """Print how the device works: what a flag, or the device itself, decided."""
    within, memory = "within documents" if run.model.attends_within else "by mask", ""
    if run.device.type == "cuda":  # a pass was tried
        peak = torch.cuda.max_memory_allocated(run.device) / 2**30
        whole = torch.cuda.get_device_properties(run.device).total_memory / 2**30
        memory = f", {peak:.1f} of {whole:.1f} GiB"
        if run.args.dtype == "float16" and not card_has_bfloat16(run.device):
            log("note: this card has no bfloat16: products in float16, gradients scaled")
    log(
        f"pass: {run.micro_batch:,} rows at once, {run.rows_per_device // run.micro_batch} times "
        f"an update, {'compiled' if run.args.use_compile else 'eager'}, attention {within}{memory}"
    )


def cost(args: TrainConfig, minutes: float) -> str:
    """What the machine costs in these minutes; nothing if no price was given."""
    if args.price_per_hour is None:
        return ""
    return f", {minutes / 60 * args.price_per_hour:,.2f} at {args.price_per_hour:g} an hour"


def report_dry_run(
    run: Run, windows: Iterable[list], step: Callable[[Run, list, int], Outcome]
) -> None:
    """--dry_run 1: what a few updates tell of time, memory and cost of the whole run.

    Args: windows, step: the batches of each update, and what makes it of them."""
    seconds, since = [], time.monotonic()
    for window in itertools.islice(windows, DRY_RUN_UPDATES):
        num_labels = distributed.totals(sum(batch.num_labels for batch in window))[0]
        step(run, window, int(num_labels)).grad_norm.item()  # waits for the device
        seconds.append(time.monotonic() - since)
        since = time.monotonic()
    update = statistics.median(seconds[SKIPPED:] or seconds)
    startup = run_time() - len(seconds) * update  # what was compiled belongs to it
    tokens = run.global_batch * run.args.max_seq_len
    evaluation = run.evaluation_updates * update + GENERATION
    if run.budget:
        each = update + evaluation / run.args.eval_interval
        updates = max(1, int((run.budget.seconds - startup - evaluation) / each))
    else:
        updates = math.ceil(run.rows_per_epoch / run.global_batch) * run.args.epochs
    evaluations = math.ceil(updates / run.args.eval_interval)
    minutes = (startup + updates * update + evaluations * evaluation) / 60
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device)
    total, _ = get_model_params(run.model, run.config)
    log(
        f"dry run: {update:.3f} s an update (median of {len(seconds[SKIPPED:] or seconds)}), "
        f"{tokens / update:,.0f} tokens/s, {memory / 2**30:.2f} GiB at the peak\n"
        f"dry run: {updates:,} updates, {updates * tokens:,} tokens, "
        f"{updates * tokens / total:.1f} a parameter, in {minutes:.1f} minutes"
        f"{cost(run.args, minutes)}; {evaluations:,} evaluations are in it, saves come on top"
    )


def run_time() -> float:
    """Seconds since this process began."""
    return time.monotonic() - process_start()
