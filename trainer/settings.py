"""Flags that people type: checked together, refused in one line, compared on resume."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from trainer.checkpoint import CheckpointError


class SettingsError(ValueError):
    """Flags that cannot be used; the message says what was found and what was expected."""

    exit_status = 2


class HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Shows every default, and the description as it is written."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others here."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. See --help.\n")


AT_LEAST_ONE = (
    "epochs",
    "batch_size",
    "accumulation_steps",
    "log_interval",
    "save_interval",
    "eval_interval",
    "eval_tokens",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def check_flags(args: argparse.Namespace) -> None:
    """Raises: SettingsError listing every flag that is out of range."""
    problems = [
        f"--{name} is {getattr(args, name)}, expected 1 or more"
        for name in AT_LEAST_ONE
        if getattr(args, name) < 1
    ]

    def expect(holds: bool, problem: str) -> None:
        if not holds:
            problems.append(problem)

    expect(args.num_workers >= 0, f"--num_workers is {args.num_workers}, expected 0 or more")
    expect(args.learning_rate > 0, f"--learning_rate is {args.learning_rate}, expected above 0")
    expect(args.grad_clip > 0, f"--grad_clip is {args.grad_clip}, expected above 0 (inf: none)")
    expect(0 <= args.dropout < 1, f"--dropout is {args.dropout}, expected 0 or more, below 1")
    share = args.heldout_fraction
    expect(0 <= share < 1, f"--heldout_fraction is {share}, expected 0 or more, below 1")
    length = args.max_seq_len
    expect(2 <= length <= 32768, f"--max_seq_len is {length}, expected 2 to 32768")
    expect("/" not in args.save_weight, "--save_weight is a path, expected a name; see --save_dir")
    problems += device_problems(args.device)
    if problems:
        raise SettingsError("; ".join(problems) + ".")


def device_problems(name: str) -> list[str]:
    """What keeps this machine from training on ``--device``, in words; empty if nothing does."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"--device is {name!r}, expected cuda, mps or cpu"]
    if device.type == "cuda" and not torch.cuda.is_available():
        return ["--device is cuda, but PyTorch finds no CUDA device here; --device cpu works"]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return [f"--device is {name}, but there are {torch.cuda.device_count()} CUDA devices"]
    if device.type == "mps" and not torch.backends.mps.is_available():
        return ["--device is mps, but PyTorch finds no Metal device here; --device cpu works"]
    return []


def default_device() -> str:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


DECIDING = (
    *("epochs", "learning_rate", "grad_clip", "dropout", "seed", "dtype", "from_weight"),
    *("max_seq_len", "packing", "heldout_fraction", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "intermediate_size", "use_moe"),
)


def default_dtype(device: str) -> str:
    """bfloat16, but float32 on a CPU that would have to emulate it, up to 20 times slower."""
    if not device.startswith("cpu"):
        return "bfloat16"
    found = getattr(torch.cpu, "get_capabilities", dict)()  # where torch cannot say: none
    return "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def deciding_settings(args: argparse.Namespace, num_ranks: int, digests: dict[str, str]) -> dict:
    """Whatever changes the result of a run if it changes; saved, and compared on resume."""
    return {name: getattr(args, name) for name in DECIDING} | {
        "rows per update": args.batch_size * args.accumulation_steps * num_ranks,
        "content of data_path": digests["data"][:16],
        "content of tokenizer_path": digests["tokenizer"][:16],
    }


def run_program(program: Callable[[], None]) -> int:
    """Run it; an error that people cause becomes one line on stderr and an exit status."""
    try:
        program()
    except KeyboardInterrupt:
        message, status = "stopped. --from_resume 1 goes on from the last saved state.", 130
    except OSError as error:
        message, status = f"{error}. What was saved before is intact.", 6
    except ValueError as error:
        if not hasattr(error, "exit_status"):
            raise
        message, status = str(error), error.exit_status
    else:
        return 0
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine, not once a rank
        print(f"error: {message}", file=sys.stderr)
    return status


def check_same_settings(saved: dict, given: dict) -> None:
    """Raises: CheckpointError naming each setting that the saved run had otherwise."""
    changed = [
        f"{key} (saved {saved.get(key)}, given {given.get(key)})"
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"--from_resume 1: these settings differ from the saved run's: {', '.join(changed)}. "
            f"Give the saved ones, or start another run with --save_weight NAME."
        )
