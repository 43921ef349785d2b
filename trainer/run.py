"""The run: what an update reads or changes, how it is saved, and how it is restored."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.model_minimind import CausalLMOutput, MiniMindConfig, MiniMindForCausalLM
from trainer import distributed
from trainer.bad_updates import report_bad
from trainer.checkpoint import checkpoint_name, restore_rng, save_for_all
from trainer.device import setup_seed
from trainer.errors import SettingsError
from trainer.flags import TrainConfig, skipped_updates
from trainer.optimizer import load_optimizer
from trainer.plan import NOT_KNOWN, Budget, Plan, rows_of_run
from trainer.progress import Outcome, Progress, to_host
from trainer.schedule import learning_rate
from trainer.step_times import StepTimes
from trainer.weights import describes, save_weights, weights_path

LossOf = Callable[[MiniMindForCausalLM, Any], Any]  # of a batch, as from next_token_loss
MAX_PENDING = 100  # outcomes of updates that nobody has looked at; they hold memory
WITHOUT = "without"  # in a state: the names of the fast paths that failed


class Update(NamedTuple):
    """An update whose outcome nobody has looked at yet: looking waits for the device."""

    step: int
    first_row: int  # of the epoch
    num_rows: int
    num_labels: int
    outcome: Outcome


def next_token_loss(model: MiniMindForCausalLM, batch: Any) -> CausalLMOutput:
    """What is minimized: the model's own loss of a batch, the mean over its labels."""
    return model(**batch.model_inputs)


@dataclass
class Run:
    """All that an update reads or changes. It changes only between updates, so every save can be
    resumed. Raises: SettingsError if its epochs are too many."""

    args: TrainConfig
    config: MiniMindConfig
    settings: dict  # what decides the result; must be the same when the run is resumed
    rounding: dict  # what decides only its last bits
    model: MiniMindForCausalLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: AbstractContextManager
    device: torch.device
    rows_per_epoch: int
    documents_of: Callable[[Iterable[int]], list[int]]  # rows of this epoch -> their documents
    times: StepTimes
    progress: Progress = field(default_factory=Progress)
    pending: list[Update] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)  # what the metrics file holds; on rank 0
    latest: dict = field(default_factory=dict)  # newest loss and held-out loss
    rollbacks: list[list] = field(default_factory=list)  # [--resume_step, --skip_steps] each
    plan: Plan = field(init=False)  # how many rows, and which share of the run is done
    budget: Budget | None = None  # what the plan follows; on all ranks, rank 0's counts
    seconds_spent: float = 0.0  # of the budget, by earlier starts
    rows_held_out: int = 0
    pairs: Tensor | None = None  # how often tokens follow each other, if the start is from that
    loss_of: LossOf = next_token_loss
    measures: tuple[str, ...] = ()  # what else it returns, per label, for evaluations
    tracker_id: str | None = None  # of this run in the tracker
    fast_paths: dict[str, str] = field(default_factory=dict)  # "used", or why not; see make_fast
    can_generate: bool = True  # False once transformers was found to compute something else
    micro_batch: int = field(init=False)  # rows per forward pass on each device
    gradients: distributed.GradientSum = field(init=False)

    def __post_init__(self) -> None:
        self.reset_micro_batch()
        self.gradients = distributed.GradientSum(self.model.parameters())
        rows, epochs = self.rows_per_epoch, self.args.epochs
        self.plan = Plan(NOT_KNOWN if self.budget else rows_of_run(rows, epochs))

    @property
    def rows_seen(self) -> int:
        """The clock: rows consumed."""
        return self.progress.rows_seen

    @property
    def step(self) -> int:
        """Updates done."""
        return self.progress.step

    @property
    def total_rows(self) -> int:
        """Rows of the whole run."""
        return self.plan.total_rows

    @property
    def num_epochs(self) -> int:
        """Passes over the data, the last one perhaps in part."""
        return -(-self.total_rows // self.rows_per_epoch)

    @property
    def global_batch(self) -> int:
        """Rows of one update, over all ranks."""
        return self.rows_per_device * distributed.world_size()

    @property
    def evaluation_updates(self) -> float:
        """Roughly how many updates take as long as an evaluation, which has no backward pass."""
        return self.rows_held_out / (3 * self.global_batch)

    @property
    def rows_per_device(self) -> int:
        """Rows of an update on each rank; fewer in the last update of an epoch."""
        return self.args.batch_size * self.args.accumulation_steps

    @property
    def rounding_now(self) -> dict:
        """``rounding`` with what was chosen for this machine."""
        chosen = {"micro_batch_size": str(self.micro_batch)}
        return self.rounding | chosen | {WITHOUT: ", ".join(self.plain_paths())}

    def reset_micro_batch(self) -> None:
        """Take as many rows per pass as the flags say."""
        given = self.args.micro_batch_size or self.args.batch_size
        self.micro_batch = largest_divisor(self.rows_per_device, given)

    def plain_paths(self) -> list[str]:
        """The names of the fast paths that failed."""
        return [name for name, found in self.fast_paths.items() if found != "used"]

    def learning_rate(self, num_rows: int) -> float:
        """The rate of the update that takes the next ``num_rows``."""
        args = self.args
        before, after = self.plan.share(self.rows_seen), self.plan.share(self.rows_seen + num_rows)
        return learning_rate(
            before, after, args.learning_rate, args.lr_schedule, args.warmup_ratio, args.decay_ratio
        )

    def updates_left(self) -> int:
        """How many more updates the budget allows; 0 between clock checks, and on other ranks."""
        if self.budget is None or not distributed.is_main_process() or not self.budget.due():
            return 0
        if self.pending:
            self.pending[-1].outcome.grad_norm.item()  # waits for the device
        left = self.budget.updates_left(
            self.step, self.args.eval_interval, self.args.save_interval, self.evaluation_updates
        )
        return 0 if left is None else max(1, left)

    def plan_for(self, updates: int) -> None:
        """Plan to end after this many more updates."""
        per_epoch = -(-self.rows_per_epoch // self.global_batch)
        epochs, rows = divmod(self.rows_seen, self.rows_per_epoch)
        epochs, last = divmod(epochs * per_epoch + rows // self.global_batch + updates, per_epoch)
        end = epochs * self.rows_per_epoch + last * self.global_batch
        self.plan = self.plan.changed(self.rows_seen, min(end, NOT_KNOWN))

    @property
    def is_done(self) -> bool:
        """Whether all rows have been consumed."""
        return self.rows_seen >= self.total_rows

    def due(self, interval: int) -> bool:
        """Whether something that happens every ``interval`` updates, and at the end, is due."""
        return self.step > 0 and (self.step % interval == 0 or self.is_done)

    @property
    def evaluation_due(self) -> bool:
        """Whether this update is still to be evaluated; a signal may have postponed it."""
        return self.due(self.args.eval_interval) and self.progress.evaluated_step < self.step

    def skips_next(self) -> bool:
        """Whether --skip_steps, of this start or of an earlier one, skips the next update."""
        return any(self.step + 1 in skipped_updates(skipped) for _, skipped in self.rollbacks)

    def advance(self, num_rows: int, num_labels: int = 0, outcome: Outcome | None = None) -> None:
        """Count an update, which was skipped if it has no outcome."""
        first_row = self.rows_seen % self.rows_per_epoch
        self.progress.rows_seen += num_rows
        self.progress.step += 1
        if len(self.pending) == MAX_PENDING:
            self.read_outcomes()
        if outcome is not None:
            self.pending.append(Update(self.step, first_row, num_rows, num_labels, outcome))

    def read_outcomes(self) -> tuple[float | None, list[float]]:
        """Read the outcomes since the last call; waits for the device.

        Returns: the norm of the newest gradient, None if there was no update, and the share of
        tokens that each expert had in it.
        Raises: BadUpdateError once more than --max_bad_updates in a row were not finite."""
        seen = to_host([update.outcome for update in self.pending])
        for update, outcome in zip(self.pending, seen, strict=True):
            self.progress.add(outcome, update.num_labels)
            if not outcome.is_finite:
                report_bad(self, update, outcome.culprits)
        self.pending.clear()
        if not seen:
            return None, []
        load = seen[-1].expert_load
        return seen[-1].grad_norm, [tokens / max(sum(load), 1) for tokens in load]

    def close_interval(self) -> dict[str, float]:
        """Mean losses since the last call, none if nothing was learnt; ``read_outcomes`` first."""
        losses = self.progress.close_interval(with_aux=self.config.use_moe)
        self.latest |= losses
        return losses

    def save(self, tracker_id: str | None) -> tuple[Path, float]:
        """Write the state, then the weights: a run whose weights exist can be resumed.

        Every rank calls it. Returns: the state's path, and the seconds it took.
        Raises: OSError if a disk fails; what was saved before is intact."""
        self.read_outcomes()
        args, since = self.args, time.monotonic()
        name = checkpoint_name(args.save_weight, self.config)
        parts = {
            "model": self.weights(),
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "settings": self.settings,
            "rounding": self.rounding_now,
            "progress": self.progress.to_dict(),
            "latest": self.latest,
            "records": self.records,
            "rollbacks": self.rollbacks,
            "plan": self.plan._asdict(),
            "seconds_spent": self.budget.spent() if self.budget else self.seconds_spent,
            "epoch": min(self.rows_seen // self.rows_per_epoch, self.num_epochs - 1),
            "step": self.step,
            "wandb_id": tracker_id,
        }
        path = save_for_all(args.checkpoint_dir, name, self.step, parts, args.keep_states)
        distributed.on_main_process(self.export)
        return path, time.monotonic() - since

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters by name; a head that is tied to the embedding is omitted."""
        tied = self.config.tie_word_embeddings
        state = self.model.state_dict().items()
        return {k: v for k, v in state if not (tied and k == "lm_head.weight")}

    def export(self) -> None:
        """Write the weights and their description, unless the files are those of this update."""
        path = weights_path(self.args.save_dir, self.args.save_weight, self.config)
        done = {"step": self.step, self.args.program.unit: self.progress.tokens_seen, **self.latest}
        summary = done | {"settings": self.settings}
        if not describes(path, summary):
            save_weights(path, self.model, summary)

    def anneal(self) -> None:
        """Leave the stable phase of a wsd run: from here the rate falls to the end.

        The decay is as long as if the run had been planned to this length.

        Raises: SettingsError if the rate is not at its peak."""
        args, rate = self.args, self.learning_rate(0)
        if args.lr_schedule != "wsd" or not math.isclose(rate, args.learning_rate):
            raise SettingsError(
                f"--anneal_from {args.anneal_from}: its rate is {rate:g}, expected the peak of a "
                f"--lr_schedule wsd run, {args.learning_rate:g}"
            )
        stable = 1 - args.decay_ratio
        self.plan = Plan(NOT_KNOWN if self.budget else self.rows_seen, self.rows_seen, stable)
        self.seconds_spent, self.tracker_id = 0.0, None  # they belong to the run that saved it
        self.records = [r | {"progress": 0.0} for r in self.records]  # was that of its plan
        if self.budget:
            self.budget.spent_before = 0.0
        else:
            self.plan_decay()

    def plan_decay(self) -> None:
        """Plan to end as ``anneal`` says, by updates, from where it was called."""
        updates = (self.rows_seen - self.plan.from_row) / self.global_batch  # since then
        decay = (self.step - updates) * self.args.decay_ratio / (1 - self.args.decay_ratio)
        self.plan_for(max(1, math.ceil(decay - updates)))

    def restore(self, state: dict) -> None:
        """Become the run that saved ``state``, after guard/check_state.py has checked it.

        Raises: CheckpointError, with nothing copied, if its random generators cannot be used."""
        if distributed.rank() < len(state["rng"]):
            restore_rng(state["rng"][distributed.rank()])
        else:  # the saved run had fewer ranks
            setup_seed(hash((self.args.seed, state["step"], distributed.rank())) % 2**32)
        self.model.load_state_dict(state["model"], strict=False)  # it lacks a tied head
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress, self.plan = Progress(**state["progress"]), Plan(**state["plan"])
        self.latest, self.records = state["latest"], state["records"]
        failed = filter(None, state["rounding"].get(WITHOUT, "").split(", "))
        self.fast_paths = dict.fromkeys(failed, "failed at an earlier start of this run")
        self.rollbacks, self.tracker_id = state["rollbacks"], state["wandb_id"]
        self.seconds_spent = state["seconds_spent"]
        if self.budget:
            self.budget.spent_before = self.seconds_spent
        elif self.total_rows == NOT_KNOWN:  # a run by time, saved before it had a plan
            if self.plan.from_row:
                return self.plan_decay()
            self.plan = Plan(self.rows_per_epoch * self.args.epochs)


def largest_divisor(number: int, limit: float) -> int:
    """The largest divisor of ``number`` that is not above ``limit``, at least 1."""
    return next(d for d in range(max(1, min(number, int(limit))), 0, -1) if number % d == 0)
