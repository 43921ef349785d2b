"""Pretrain a MiniMind language model from scratch.

    python train_pretrain.py --preset demo            # minutes on a laptop's CPU
    python train_pretrain.py                          # 64 M parameters on one GPU
    torchrun --nproc_per_node 8 train_pretrain.py     # on eight
    python train_pretrain.py --from_resume 1          # resume after a kill

One clock runs the program: the number of rows consumed. The learning rate, the order of the data
and resume follow from it. This file tells the story; its parts are in dataset/, model/, trainer/.
"""

if __name__ == "__main__":
    import trainer.host

    trainer.host.begin_program()

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import Batch, PretrainDataset, SkipBatchSampler
from dataset.loader import load_batches
from dataset.token_cache import TokenCache, build_token_cache, special_ids
from model.model_minimind import MiniMindConfig
from trainer import distributed
from trainer.auto import choose, pass_times
from trainer.bigrams import look_back, start_from_bigrams
from trainer.command_line import parse_flags
from trainer.describe import describe_pass, describe_run, report_dry_run
from trainer.device import join_ranks, setup_seed
from trainer.errors import SettingsError
from trainer.evaluation import evaluate
from trainer.fast_paths import make_fast
from trainer.flags import TrainConfig
from trainer.guard.guard import Guard
from trainer.host import keep_freed_memory
from trainer.metrics import Metrics, open_metrics
from trainer.optimizer import build_optimizer, set_lr, step_if_finite
from trainer.plan import Budget
from trainer.program import run_program
from trainer.progress import Outcome
from trainer.run import Run
from trainer.saved_settings import deciding_settings, keep_split, rounding_settings
from trainer.step_times import StepTimes
from trainer.weights import init_model, load_tokenizer

OpenData = Callable[[TrainConfig, PreTrainedTokenizerBase], PretrainDataset]
BuildRun = Callable[..., Run]
Evaluate = Callable[[], bool]  # whether it came to the end; a signal stops it
Step = Callable[[Run, list[Batch], int], Outcome]


def train(
    config: TrainConfig, guard: Guard, open_data: OpenData, build_run: BuildRun, step: Step
) -> None:
    """From flags to a trained model.

    Args: open_data, build_run, step: as below (the last one train_step); another kind of training
        hands in its own.
    Raises: the errors of trainer/errors.py, DataError, OSError."""
    # 1. Ranks, device, seed
    device = join_ranks(config.device, config.timeout)
    if device.type == "cpu":
        keep_freed_memory()
    setup_seed(config.seed)

    # 2. What is to be trained, and where an earlier start of it stopped
    tokenizer = load_tokenizer(config.tokenizer_path)
    model_config = build_config(config, tokenizer)
    state = guard.state(model_config)

    # 3. Data, model, optimizer
    data = open_data(config, tokenizer)
    held_out = data.held_out(config.eval_tokens)
    run = build_run(config, model_config, data, len(held_out) if held_out else 0, state, device)
    setup_seed(config.seed + distributed.rank())  # ranks draw their own dropout
    describe_run(run, data.cache.meta, len(held_out.documents) if held_out else 0)

    # 4. Resume, or begin
    if not guard.begin(run, state, data.cache.meta["num_bad"]):
        return
    del state  # as large as model and optimizer together
    make_fast(run, data, partial(forward_backward, run))
    describe_pass(run)
    if config.dry_run:
        return report_dry_run(run, held_out, windows(run, data), step)

    # 5. Train
    metrics = open_metrics(run)
    metrics.log_pairs(held_out)
    parts = held_out.by_language(tokenizer) if held_out else {}

    def eval_now() -> bool:
        scored = {
            name: (batches_of(run, part), part.num_text_bytes) for name, part in parts.items()
        }
        with metrics.outside_training("evaluation"):
            return evaluate(run, scored, tokenizer, metrics, guard.stopping)

    with guard.training(run):
        if run.evaluation_due:  # put off by the signal that stopped the last run
            if not eval_now():
                raise guard.interrupted(run, metrics, saved=False)
            guard.save(run, metrics)
        while not run.is_done:
            data.set_epoch(run.rows_seen // run.rows_per_epoch)
            train_epoch(run, data, metrics, guard, eval_now, step)
    metrics.close()


def train_epoch(
    run: Run, data: PretrainDataset, metrics: Metrics, guard: Guard, eval_now: Evaluate, step: Step
) -> None:
    """Train on the rows that are left of this epoch. Raises: Interrupted, saved, after a signal."""
    config = run.args
    for window, num_rows in windows(run, data):
        run.times.mark("data")
        own_labels = sum(batch.num_labels for batch in window)
        num_labels, num_stops, updates_left = distributed.totals(
            own_labels, guard.stopping(), run.updates_left()
        )
        run.times.mark("exchange")  # also the wait for a slower rank
        if updates_left:
            run.plan_for(int(updates_left))
            metrics.log_plan()
        lr = set_lr(run.optimizer, run.learning_rate(num_rows), run.step)
        if run.skips_next():
            run.advance(num_rows)
        else:
            run.advance(num_rows, int(num_labels), step(run, window, int(num_labels)))
        metrics.add_update(num_rows, int(num_labels))
        if run.due(config.log_interval):  # it waits for the device: not on every update
            metrics.log_interval(lr)
        stopping = num_stops > 0 or (run.evaluation_due and not eval_now())
        if stopping or run.due(config.save_interval):
            guard.save(run, metrics)
        if stopping:
            raise guard.interrupted(run, metrics, saved=True)
    run.read_outcomes()  # while this epoch's order can tell a bad update's documents


def train_step(run: Run, window: list[Batch], num_labels: int) -> Outcome:
    """One update. The loss is the window's sum over the window's labels, on all ranks together: how
    it is split into batches and ranks changes nothing. If it is not finite, nothing is applied."""
    sums = torch.zeros(2 + run.model.num_experts, device=run.device)
    for i, batch in enumerate(window, 1):
        if i == len(window):
            run.gradients.send_when_ready()
        sums = sums + forward_backward(run, batch, batch.num_labels / max(num_labels, 1))
    run.times.mark("forward_backward")
    sums, culprits = run.gradients.sum_over_ranks(sums)
    run.times.mark("exchange")  # what the last backward pass did not hide
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.grad_clip)
    step_if_finite(run.optimizer, run.scaler, sums, grad_norm)
    run.times.mark("optimizer")
    return Outcome(sums[0], sums[1], sums[2:], grad_norm, culprits)


def forward_backward(run: Run, batch: Batch, share: float) -> Tensor:
    """Add the gradient of this micro-batch's mean loss, times ``share``, to the model's.

    Returns: (2 + E,) nats, aux loss * labels and the tokens that each expert had, in this batch."""
    batch = batch.to(run.device)
    with run.autocast:
        out = run.loss_of(run.model, batch)
    run.scaler.scale((out.loss + out.aux_loss) * share).backward()
    losses = torch.stack((out.loss.detach(), out.aux_loss.detach())) * batch.num_labels
    return torch.cat((losses, out.expert_load))


def windows(run: Run, data: PretrainDataset) -> Iterator[tuple[list[Batch], int]]:
    """The updates left in this epoch: this rank's batches, and the number of rows of all ranks.

    The last window of an epoch may be short, and a rank may have no batch in it."""
    first_row = run.rows_seen % run.rows_per_epoch
    batches = batches_of(run, data, first_row)
    per_rank = run.global_batch // distributed.world_size()
    for start in range(first_row, run.rows_per_epoch, run.global_batch):
        if run.is_done:
            return
        window = list(itertools.islice(batches, per_rank // run.micro_batch))
        yield window, min(run.global_batch, run.rows_per_epoch - start)


def batches_of(run: Run, data: PretrainDataset, first_row: int = 0) -> Iterator[Batch]:
    """This rank's share of the rows from ``first_row`` on, in full micro-batches."""
    config, size = run.args, run.micro_batch
    sampler = SkipBatchSampler(
        range(math.ceil(len(data) / size) * size),  # rows past the last are padding
        size,
        skip_batches=first_row // size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    pin_memory = run.device.type == "cuda" and not data.was_moved
    workers = {"num_workers": config.num_workers, "timeout": config.timeout}
    return load_batches(data, sampler, **workers, pin_memory=pin_memory)


# ---------------------------------------------------------------------------------------- build


def build_config(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> MiniMindConfig:
    """The architecture that the flags describe. Raises: SettingsError if sizes do not fit."""
    bos, eos, pad = special_ids(tokenizer)
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    try:
        return MiniMindConfig(**config.architecture(), vocab_size=len(tokenizer), **ids)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def open_data(args: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainDataset:
    """The rows, tokenized by one process of each machine while the others wait.

    Raises: DataError."""

    def build() -> str:
        source = args.data_path, tokenizer, args.cache_dir, args.bad_records, args.text_column
        return str(build_token_cache(*source).folder)

    return PretrainDataset(
        TokenCache.open(distributed.on_each_machine(build)),
        tokenizer,
        args.max_seq_len,
        packing=bool(args.packing),
        seed=args.seed,
        heldout_fraction=args.heldout_fraction,
    )


def build_run(
    args: TrainConfig,
    config: MiniMindConfig,
    data: PretrainDataset,
    num_rows_held_out: int,
    state: dict | None,
    device: torch.device,
) -> Run:
    """Model, optimizer, precision, as at the start of a run; ``state`` is restored later.

    Raises: SettingsError, CheckpointError."""
    weight = args.from_weight if state is None else "none"
    model, _ = init_model(config, weight, args.tokenizer_path, args.save_dir, device)
    pairs = None
    if args.embedding_init == "bigrams" and state is None:
        rows = map(data.__getitems__, SkipBatchSampler(range(len(data)), 4096))
        pairs = start_from_bigrams(model, rows)
        look_back(model, args.look_back_heads)
    dtype, num_ranks = args.torch_dtype, distributed.world_size()
    model.model.residual_dtype = getattr(torch, str(args.residual_dtype))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    args = choose(args, model, len(data), state, partial(pass_times, model, data, autocast))
    kept = keep_split(args, state, num_ranks)
    return Run(
        args=kept,
        config=config,
        rounding=rounding_settings(args, num_ranks),  # as given: the next start compares
        settings=deciding_settings(kept, num_ranks, data.cache.meta["digests"]),
        model=model,
        optimizer=build_optimizer(model, args.learning_rate, args.optimizer, dtype, args.tuning()),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        autocast=autocast,
        device=device,
        rows_per_epoch=len(data),
        documents_of=data.documents_of,
        times=StepTimes(device),
        budget=Budget(60 * args.max_minutes) if args.max_minutes else None,
        rows_held_out=num_rows_held_out,
        pairs=pairs,
        rollbacks=[[None, args.skip_steps]] if args.skip_steps else [],
    )


# ----------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, see trainer/errors.py."""

    def program() -> None:
        config = parse_flags(argv, __doc__)
        with Guard(config) as guard:
            train(config, guard, open_data, build_run, train_step)
            distributed.close()

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
