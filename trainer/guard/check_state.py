"""Checks that a state can be from this run, made before any part of it is restored."""

import math

from torch import Tensor

from trainer.errors import printable
from trainer.flags import skipped_updates
from trainer.optimizer import expected_state
from trainer.plan import NOT_KNOWN, Plan
from trainer.progress import Progress
from trainer.run import Run
from trainer.saved_settings import check_same_settings
from trainer.state import check_fits, refuse_unless

LAYOUT = {  # of every state, whatever the model; see check_fits for the notation
    "format": int,
    "epoch": int,
    "step": int,
    "wandb_id": str | None,
    "model": dict,
    "optimizer": {"state": dict, "param_groups": [dict]},
    "scaler": dict,
    "settings": {str: int | float | str | None},
    "rounding": {str: str},
    "progress": Progress().to_dict(),
    "latest": {str: float},
    "records": [dict],
    "rollbacks": [[int | str | None]],
    "plan": Plan(0)._asdict(),
    "seconds_spent": float,
    "rng": [{"python": list, "torch": Tensor, "cuda": Tensor | None}],
}


def check_layout(state: dict) -> None:
    """Raises: CheckpointError naming the first field whose type or structure is wrong."""
    check_fits(state, LAYOUT, "state")
    refuse_unless(state["rng"], "it has no random generators")
    for number, record in enumerate(state["records"]):
        where, texts = f"records[{number}]", record.get("continuations", {})
        check_fits(record | {"continuations": ""}, {str: int | float | str}, where)
        check_fits(texts, {str: str}, f"{where}.continuations")
        check_fits(record.get("step"), 0, f"{where}.step")
    for number, rollback in enumerate(state["rollbacks"]):
        try:
            _, skipped = rollback
            skipped_updates(skipped)
        except (ValueError, AttributeError):
            wanted = "a pair of --resume_step and --skip_steps"
            refuse_unless(False, f"rollbacks[{number}] is not {wanted}")


def check_state(state: dict, run: Run) -> None:
    """Check that each part of a state fits the run that will continue it.

    Raises: SettingsError if settings differ, CheckpointError naming the first part that does not
    fit."""
    check_same_settings(state["settings"], run.settings, type(run.args))
    check_fits(state["model"], run.weights(), "model")
    if state["optimizer"]["state"] or state["progress"]["tokens_seen"]:  # or no update was made yet
        check_fits(state["optimizer"]["state"], expected_state(run.optimizer), "optimizer")
    check_scaler(state["scaler"], run.scaler.state_dict())
    check_plan(Plan(**state["plan"]), state["seconds_spent"], run)
    Progress(**state["progress"]).check(
        state["step"], state["plan"]["total_rows"], run.rows_per_epoch, run.global_batch
    )


def changed_rounding(state: dict, run: Run) -> str:
    """The rounding settings that have changed since the state was saved, for a message."""
    now = run.rounding_now
    return ", ".join(
        f"{name} {printable(old)} (now {now.get(name)})"
        for name, old in state["rounding"].items()
        if now.get(name) != old
    )


def check_scaler(found: dict, own: dict) -> None:
    """Raises: CheckpointError unless this run's gradient scaler could have reached this state."""
    check_fits(found, own, "scaler")
    if own:
        start = own | {name: found[name] for name in ("scale", "_growth_tracker")}
        possible = 0 < found["scale"] < math.inf and (
            0 <= found["_growth_tracker"] <= own["growth_interval"]
        )
        refuse_unless(possible and found == start, f"scaler is {found}, expected one like {own}")


def check_plan(plan: Plan, seconds_spent: float, run: Run) -> None:
    """Raises: CheckpointError unless this run could have made this plan."""
    by_epochs = plan.total_rows == run.rows_per_epoch * run.args.epochs
    changed = run.budget or seconds_spent > 0 or plan.from_row > 0
    refuse_unless(
        0 <= plan.from_row <= plan.total_rows <= NOT_KNOWN
        and 0 <= plan.from_share <= 1
        and 0 <= seconds_spent < math.inf
        and (by_epochs or changed),
        f"its plan is {printable(tuple(plan))} after {seconds_spent:.3f} s",
    )
