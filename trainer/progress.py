"""How far a run has come: plain numbers, which states hold as JSON."""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import CheckpointError


class Outcome(NamedTuple):
    """The result of an update, summed over all ranks; it stays on the device until it is read."""

    nats: Tensor  # () summed loss of the window's labels
    aux: Tensor  # () aux loss * labels
    expert_load: Tensor  # (E,) tokens that each expert had
    grad_norm: Tensor  # () before clipping
    culprits: Tensor  # (world_size,) nonzero for each rank whose own gradient was not finite

    def flat(self) -> Tensor:
        """(3 + E + world_size,) all of it in one tensor, for one transfer."""
        return torch.cat(
            [torch.stack((self.nats, self.aux, self.grad_norm)), self.expert_load, self.culprits]
        )


class Seen(NamedTuple):
    """An outcome on the host, as numbers."""

    nats: float
    aux: float
    grad_norm: float
    expert_load: list[float]  # (E,)
    culprits: list[int]  # ranks whose own gradient was not finite

    @property
    def is_finite(self) -> bool:
        """Whether the update was applied."""
        return math.isfinite(self.nats + self.aux + self.grad_norm)


def to_host(outcomes: list[Outcome]) -> list[Seen]:
    """Copy outcomes to the host in one transfer; waits for the device."""
    if not outcomes:
        return []
    num_experts = len(outcomes[0].expert_load)
    rows = torch.stack([outcome.flat() for outcome in outcomes]).tolist()
    return [
        Seen(
            nats,
            aux,
            grad_norm,
            rest[:num_experts],
            [rank for rank, bad in enumerate(rest[num_experts:]) if bad],
        )
        for nats, aux, grad_norm, *rest in rows
    ]


@dataclass
class Progress:
    """Counts since the run's first update, over all starts."""

    rows_seen: int = 0  # the clock
    step: int = 0  # updates done
    tokens_seen: int = 0  # labels that carried loss in updates that were applied
    evaluated_step: int = 0  # the update after which the last evaluation was made
    bad_updates: int = 0  # skipped because loss or gradient was not finite
    bad_in_a_row: int = 0
    interval_labels: int = 0  # since the last log line
    interval_nats: float = 0.0
    interval_aux: float = 0.0  # aux loss * labels

    def to_dict(self) -> dict[str, int | float]:
        """The counts by name, as a state holds them."""
        return asdict(self)

    def add(self, outcome: Seen, num_labels: int) -> None:
        """Count an update, applied or not."""
        if outcome.is_finite:
            self.bad_in_a_row = 0
            self.tokens_seen += num_labels
            self.interval_labels += num_labels
            self.interval_nats += outcome.nats
            self.interval_aux += outcome.aux
        else:
            self.bad_updates += 1
            self.bad_in_a_row += 1

    def close_interval(self, with_aux: bool) -> dict[str, float]:
        """Mean losses since the last call; empty if no update was applied."""
        losses = {}
        if self.interval_labels:
            losses["loss"] = self.interval_nats / self.interval_labels
            if with_aux:
                losses["aux_loss"] = self.interval_aux / self.interval_labels
        self.interval_labels, self.interval_nats, self.interval_aux = 0, 0.0, 0.0
        return losses

    def check(
        self, saved_step: int, total_rows: int, rows_per_epoch: int, global_batch: int
    ) -> None:
        """Raises: CheckpointError unless a run can have these counts: rows determine updates.

        Args:
            saved_step: the update in the state's own record.
            total_rows: of the whole run; rows_per_epoch, global_batch: rows of an update."""
        epochs, rows = divmod(self.rows_seen, rows_per_epoch)
        updates = epochs * math.ceil(rows_per_epoch / global_batch) + rows / global_batch
        if not 0 <= self.rows_seen <= total_rows or not saved_step == self.step == updates:
            raise CheckpointError(
                f"the state does not fit: it saw {self.rows_seen:,} of {total_rows:,} rows in "
                f"{self.step:,} updates of {global_batch:,}, and was saved after {saved_step:,}."
            )
        for name, count in self.to_dict().items():
            if not 0 <= count < math.inf or (name == "evaluated_step" and count > self.step):
                raise CheckpointError(f"the state does not fit: progress.{name} is {count:,}.")
