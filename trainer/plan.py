"""How long a run is: a number of rows, or as many rows as fit into a number of minutes."""

import time
from collections.abc import Callable
from typing import NamedTuple

from trainer.errors import SettingsError
from trainer.host import run_time

NOT_KNOWN = 2**40  # rows, until the speed is known; no plan has more
NUM_CLOCK_CHECKS = 100  # re-plan about 100 times per run
WINDOW = 0.1  # share of the time over which speed is measured
SKIPPED = 2  # first updates of a start, not measured: they compile and fill caches
GENERATION = 2.0  # seconds assumed for an evaluation's prompts until one was measured


class Plan(NamedTuple):
    """The share of the run that is done, as a function of the rows that were seen."""

    total_rows: int
    from_row: int = 0  # where the plan was last changed
    from_share: float = 0.0  # the share that was done there

    def share(self, rows: int) -> float:
        """0 at the start, 1 at the end; continuous even where the plan changes."""
        left = self.total_rows - self.from_row
        share = self.from_share + (1 - self.from_share) * (rows - self.from_row) / max(left, 1)
        return min(share, 1.0)

    def changed(self, rows: int, total_rows: int) -> "Plan":
        """The plan from ``rows`` on, with another end."""
        return Plan(max(total_rows, rows), rows, self.share(rows))


def rows_of_run(rows_per_epoch: int, epochs: int) -> int:
    """Their product. Raises: SettingsError if a plan cannot hold it."""
    if rows_per_epoch * epochs > NOT_KNOWN:
        raise SettingsError(
            f"--epochs is {epochs}, expected at most {NOT_KNOWN // rows_per_epoch} with "
            f"{rows_per_epoch:,} rows in an epoch: a run has at most {NOT_KNOWN:,} rows"
        )
    return rows_per_epoch * epochs


class Budget:
    """Plans a run's end so that training, evaluations and saves end when its time is up.

    Args:
        seconds: of all starts together.
        clock: seconds; begun: when this start began, by that clock."""

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        begun: float | None = None,
    ) -> None:
        self.seconds, self.clock = seconds, clock
        self.spent_before = 0.0  # by earlier starts
        self.begun = clock() - run_time() if begun is None else begun
        self.marks: list[tuple[float, int]] = []  # training seconds so far, updates
        self.paused = 0.0  # seconds spent on evaluations and saves
        self.lasted: dict[str, float] = {}  # seconds of the newest evaluation, and save
        self.next_look = 0.0
        self.num_updates = 0
        self.keep: Callable[[float], None] = lambda spent: None  # for a start after a kill

    def spent(self) -> float:
        """Seconds spent so far, by all starts."""
        return self.spent_before + self.clock() - self.begun

    def pause(self, part: str, seconds: float) -> None:
        """Count seconds of an ``evaluation`` or of ``saving``, in which nothing was trained."""
        self.paused += seconds
        self.lasted[part] = seconds

    def due(self) -> bool:
        """Count an update. Returns: whether it is time to re-plan."""
        self.num_updates += 1
        return self.num_updates > SKIPPED and self.spent() >= self.next_look

    def updates_left(
        self, step: int, eval_interval: int, save_interval: int, eval_updates: float
    ) -> int | None:
        """How many more updates fit, judged by the last ones; None while that is not known.

        Args: eval_updates: an evaluation's cost in updates, until one was measured."""
        spent = self.spent()
        self.keep(spent)
        self.next_look = spent + self.seconds / NUM_CLOCK_CHECKS
        self.marks.append((spent - self.paused, step))
        recent = [m for m in self.marks if m[0] >= self.marks[-1][0] - WINDOW * self.seconds]
        if len(self.marks) < 2:
            return None
        self.marks = recent if len(recent) > 1 else self.marks[-2:]
        (since, first), (now, last) = self.marks[0], self.marks[-1]
        update = (now - since) / max(last - first, 1)
        evaluation = self.lasted.get("evaluation", eval_updates * update + GENERATION)
        saving = self.lasted.get("saving", update)
        left = self.seconds - spent - evaluation - saving  # the last of each
        return max(0, int(left / (update + evaluation / eval_interval + saving / save_interval)))
