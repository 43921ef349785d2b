"""What is said of updates whose loss or gradient was not finite."""

from typing import Any

from trainer import distributed
from trainer.console import log
from trainer.errors import BadUpdateError


def report_bad(run: Any, update: Any, ranks: list[int]) -> None:
    """Log which documents a bad update had read.

    Args: run, update: see trainer/run.py; ranks: those whose own contribution was not finite.
    Raises: BadUpdateError after too many in a row."""
    num_ranks, micro = distributed.world_size(), run.micro_batch
    ranks = ranks or ([0] if num_ranks == 1 else [])
    span = range(update.first_row, update.first_row + update.num_rows)
    rows = [row for r in ranks for row in rows_of(r, span, micro, num_ranks)]
    documents = sorted(set(run.documents_of(rows)))
    shown = ", ".join(map(str, documents[:8])) + (", …" if len(documents) > 8 else "")
    where = "only in the sum over all ranks"
    if ranks:
        where = f"rank {', '.join(map(str, ranks))}, documents {shown}"
    found = f"update {update.step:,}: loss or gradient is not finite ({where})"
    in_a_row = run.progress.bad_in_a_row
    if in_a_row > run.args.max_bad_updates:
        first = update.step - in_a_row + 1
        raise BadUpdateError(
            f"{found}, as in each of the last {in_a_row:,} updates. None was applied: "
            f"the weights are those of update {first - 1:,}. Resume with --from_resume 1 "
            f"--skip_steps {first}:{update.step + 1}, or start again with a lower "
            f"--learning_rate."
        )
    log(f"warning: {found}; not applied")


def rows_of(rank: int, rows: range, micro_batch: int, num_ranks: int) -> list[int]:
    """The rows that a rank has in an update: micro-batches are dealt to ranks in turn."""
    return [row for i, row in enumerate(rows) if i // micro_batch % num_ranks == rank]
