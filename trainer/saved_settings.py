"""What earlier runs saved of their settings, and what that means for this one.

A state holds the settings that decide its result, which a resumed run must share, and those that
affect only rounding. The ``.json`` beside the weights of --from_weight tells how they were made.
"""

import argparse
import dataclasses
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from trainer.errors import SettingsError, printable
from trainer.flags import DECIDES, SPLITS, ModelFlags, TrainConfig
from trainer.reading import read_json


def flag_names(resume: str, config: type[TrainConfig] = TrainConfig) -> list[str]:
    """The flags that are declared with this ``resume``."""
    return [f.name for f in fields(config) if f.metadata.get("resume") == resume]


def deciding_settings(config: TrainConfig, num_ranks: int, digests: dict[str, str]) -> dict:
    """Everything that determines the result of a run; saved, and compared on resume."""
    kind = {"program": config.program.name} if config.program.is_chat else {}
    return (
        {name: getattr(config, name) for name in flag_names(DECIDES, type(config))}
        | kind
        | {
            "rows per update": config.batch_size * config.accumulation_steps * num_ranks,
            "content of data_path": digests["data"][:16],
            "content of tokenizer_path": digests["tokenizer"][:16],
        }
    )


def rounding_settings(config: TrainConfig, num_ranks: int) -> dict[str, str]:
    """Everything that affects only the last bits; saved, and reported if it changes."""
    return {name: str(getattr(config, name)) for name in flag_names(SPLITS)} | {
        "ranks": str(num_ranks),
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
    }


def keep_split(config: TrainConfig, state: dict | None, num_ranks: int) -> TrainConfig:
    """These flags; on resume with accumulation steps that keep the saved run's rows per update on
    this number of ranks. With unchanged flags, the micro-batch stays the same as well.

    Raises: SettingsError naming the numbers of ranks that are possible."""
    if state is None:
        return config
    saved, kept = state["rounding"], config
    rows, batch = state["settings"].get("rows per update"), config.batch_size
    micro = re.fullmatch(r"[1-9]\d{0,8}", saved.get("micro_batch_size", ""))
    if micro and config.micro_batch_size is None and saved.get("batch_size") == str(batch):
        kept = dataclasses.replace(config, micro_batch_size=int(micro[0]))
    changed = str(config.accumulation_steps) != saved.get("accumulation_steps")
    if changed or not isinstance(rows, int) or rows < 1:
        return kept  # check_same_settings() compares the product
    if rows % (batch * num_ranks):
        fitting = [n for n in range(1, min(rows // batch, 9999) + 1) if rows % (batch * n) == 0]
        others = f"use {', '.join(map(str, fitting))} ranks, or" if fitting else "use"
        raise SettingsError(
            f"--from_resume 1: an update of {rows} rows does not divide into batches of "
            f"{batch} on {num_ranks} ranks; {others} another --batch_size."
        )
    return dataclasses.replace(kept, accumulation_steps=rows // (batch * num_ranks))


def check_same_settings(saved: dict, given: dict, config: type[TrainConfig] = TrainConfig) -> None:
    """Raises: SettingsError with a table of the settings that differ from the saved run's."""
    older = {
        f.name: f.metadata["older"] for f in fields(config) if f.metadata.get("older") is not None
    }
    saved = older | saved
    rows = [
        (key, f"{printable(saved.get(key)):.60}", f"{printable(given.get(key)):.60}")
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key)
    ]
    if rows:
        table = [("setting", "saved", "given"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
        raise SettingsError(
            "--from_resume 1: these settings differ from the saved run's. Use the saved ones, or "
            "start another run with --save_weight NAME.\n  " + "\n  ".join(lines)
        )


# ---------------------------------------------------------------------------------- --from_weight


def described_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The architecture of --from_weight as the ``.json`` beside it tells it; empty if none does."""
    try:
        config = description_of(args)["config"]
        names = [f.name for f in fields(ModelFlags) if f.name in config and f.name != "dropout"]
        return {name: int(config[name]) for name in names}
    except (ValueError, LookupError, TypeError, OverflowError):
        return {}  # loading the weights will tell


def description_of(args: Any) -> dict[str, Any]:
    """What the ``.json`` beside the weights of --from_weight says; empty if there is none."""
    moe = "_moe" if args.use_moe else ""
    path = Path(args.save_dir) / f"{args.from_weight}_{args.hidden_size}{moe}.json"
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}
