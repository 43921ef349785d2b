"""The run: all that an update reads or changes, how it is saved, and how it goes on."""

import argparse
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import distributed
from trainer.checkpoint import CheckpointError, checkpoint_name, list_states, restore_rng
from trainer.optimizer import load_optimizer
from trainer.settings import check_same_settings
from trainer.tracker import NoTracker
from trainer.trainer_utils import is_main_process, lm_checkpoint
from trainer.weights import save_weights, weights_path

COUNTERS = ("rows_seen", "step", "tokens_seen", "interval_labels", "latest")


@dataclass
class Run:
    """It changes only between updates, so every save can resume."""

    args: argparse.Namespace
    config: MiniMindConfig
    settings: dict  # those that decide the result; a resumed run must have the same
    model: MiniMindForCausalLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: AbstractContextManager
    device: torch.device
    rows_per_epoch: int
    rows_seen: int = 0  # the clock
    step: int = 0  # updates done
    tokens_seen: int = 0  # tokens learnt from: labels that carried loss
    interval_labels: int = 0  # since the last log line
    interval_sums: Tensor = field(default_factory=lambda: torch.zeros(2))  # nats; aux loss * labels
    latest: dict = field(default_factory=dict)  # newest loss and held-out loss

    @property
    def total_rows(self) -> int:
        """Rows of the whole run."""
        return self.rows_per_epoch * self.args.epochs

    @property
    def global_batch(self) -> int:
        """Rows of one update, over all ranks."""
        return self.args.batch_size * self.args.accumulation_steps * distributed.world_size()

    @property
    def is_done(self) -> bool:
        """Whether all rows are consumed."""
        return self.rows_seen == self.total_rows

    def due(self, interval: int) -> bool:
        """Whether what happens every ``interval`` updates, and at the end, happens now."""
        return self.step % interval == 0 or self.is_done

    def advance(self, num_rows: int, num_labels: int, sums: Tensor) -> None:
        """One update is done."""
        self.rows_seen += num_rows
        self.step += 1
        self.tokens_seen += num_labels
        self.interval_labels += num_labels
        self.interval_sums += sums

    def close_interval(self) -> dict[str, float]:
        """Mean losses since the last call; waits for the device."""
        nats, aux = (self.interval_sums / max(self.interval_labels, 1)).tolist()
        self.interval_sums.zero_()
        self.interval_labels = 0
        losses = {"loss": nats, "aux_loss": aux} if self.config.use_moe else {"loss": nats}
        self.latest |= losses
        return losses

    def save(self, tracker: NoTracker) -> None:
        """Write the state, then the weights: who has a run's weights can also resume it.

        Every rank calls it. Raises: OSError if a disk fails; what was saved before is intact."""
        args = self.args
        lm_checkpoint(
            self.config, weight=args.save_weight, model=self.model, optimizer=self.optimizer,
            epoch=min(self.rows_seen // self.rows_per_epoch, args.epochs - 1), step=self.step,
            wandb=tracker, save_dir=args.checkpoint_dir, scaler=self.scaler, settings=self.settings,
            counters={name: getattr(self, name) for name in COUNTERS},
            interval_sums=self.interval_sums.cpu()
        )
        if is_main_process():
            path = weights_path(args.save_dir, args.save_weight, self.config)
            done = {"step": self.step, "tokens": self.tokens_seen, **self.latest}
            save_weights(path, self.model, done | {"settings": self.settings})

    def restore(self, state: dict) -> None:
        """Become the run that saved ``state``. Raises: CheckpointError if settings differ."""
        check_same_settings(state["settings"], self.settings)
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        self.interval_sums = state["interval_sums"].to(self.device)
        if distributed.rank() < len(state["rng"]):
            restore_rng(state["rng"][distributed.rank()])


def metrics_path(args: argparse.Namespace, config: MiniMindConfig) -> Path:
    """``out/pretrain_768_metrics.jsonl``."""
    return Path(args.save_dir) / f"{checkpoint_name(args.save_weight, config)}_metrics.jsonl"


def files_of_run(args: argparse.Namespace, config: MiniMindConfig) -> list[Path]:
    """What an earlier run of this name left: states, newest first, and weights."""
    weights = weights_path(args.save_dir, args.save_weight, config)
    states = list_states(args.checkpoint_dir, checkpoint_name(args.save_weight, config))
    return [*states, *(p for p in (weights, weights.with_suffix(".json")) if p.exists())]


def refuse_to_overwrite(args: argparse.Namespace, config: MiniMindConfig) -> None:
    """Raises: CheckpointError if a new run's first save would replace another run's files."""
    taken = files_of_run(args, config)
    if taken and not args.overwrite:
        raise CheckpointError(
            f"{taken[0]} belongs to another run. --from_resume 1 goes on with it, "
            f"--save_weight NAME starts one beside it, --overwrite 1 deletes it."
        )


def delete_run(args: argparse.Namespace, config: MiniMindConfig) -> None:
    """--overwrite 1: forget the earlier run of this name."""
    for path in files_of_run(args, config):
        path.unlink()
