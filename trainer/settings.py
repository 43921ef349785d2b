"""Flags that people type: checked together, refused in one line, compared on resume."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from trainer.errors import Interrupted, SettingsError, exit_status_of, shown
from trainer.mirror import mirror_problems
from trainer.signals import say
from trainer.versions import untried_versions


class HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Shows every default, and the description as it is written."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others here."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        words = message.split() if message.startswith("unrecognized") else []
        meant = [f for w in words for f in get_close_matches(w, self._option_string_actions)]
        close = f"Did you mean {meant[0]}? " if meant else ""
        self.exit(2, f"error: {message}. {close}See --help.\n")


AT_LEAST_ONE = (
    "epochs",
    "batch_size",
    "accumulation_steps",
    "log_interval",
    "save_interval",
    "eval_interval",
    "eval_tokens",
    "timeout",
    "keep_states",
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
    rows, micro = args.batch_size * args.accumulation_steps, args.micro_batch_size
    divides = micro is None or (micro > 0 and rows % micro == 0)
    expect(divides, f"--micro_batch_size is {micro}, expected a divisor of batch_size x "
           f"accumulation_steps = {rows}")
    warm, decay = args.warmup_ratio, args.decay_ratio
    expect(0 <= warm < 1, f"--warmup_ratio is {warm}, expected 0 or more, below 1")
    expect(0 < decay <= 1 - max(warm, 0), f"--decay_ratio is {decay}, expected above 0, with "
           f"warmup_ratio not above 1")
    expect(decay < 1 or not args.anneal_from, "--anneal_from needs a --decay_ratio below 1")
    minutes, price = args.max_minutes, args.price_per_hour
    expect(minutes is None or 0 < minutes < 1e6, f"--max_minutes is {minutes}, expected above 0")
    expect(price is None or 0 <= price < 1e9, f"--price_per_hour is {price}, expected 0 or more")
    share = args.heldout_fraction
    expect(0 <= share < 1, f"--heldout_fraction is {share}, expected 0 or more, below 1")
    length = args.max_seq_len
    expect(2 <= length <= 32768, f"--max_seq_len is {length}, expected 2 to 32768")
    skip = args.max_bad_updates
    expect(skip >= 0, f"--max_bad_updates is {skip}, expected 0 or more")
    name = args.save_weight
    named = re.fullmatch(r"\w[\w.+-]*", name)  # in a pattern for files, each stands for itself
    expect(named, f"--save_weight is {name!r}, expected a name of letters, digits and ._+-")
    rewinds = args.resume_step is None or args.from_resume
    expect(rewinds, "--resume_step is given, but --from_resume is 0; expected 1")
    try:
        skipped_updates(args.skip_steps)
    except ValueError:
        problems.append(f"--skip_steps is {args.skip_steps!r}, expected FIRST:END, as 1207:1210")
    if args.checkpoint_mirror:
        problems += mirror_problems(args.checkpoint_mirror)
        there = Path(args.checkpoint_mirror.removeprefix("file://")).resolve()
        elsewhere = there != Path(args.checkpoint_dir).resolve()
        expect(elsewhere, "--checkpoint_mirror is --checkpoint_dir, expected another disk")
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


def default_dtype(device: str) -> str:
    """bfloat16 where the device computes in it: else float16 on a card, and float32 on a CPU, which
    would have to emulate either, up to 20 times slower, and on MPS."""
    if device.startswith("cuda"):
        return "bfloat16" if card_has_bfloat16(device) else "float16"
    if device.startswith("mps"):
        return "bfloat16" if computes_in(device, torch.bfloat16) else "float32"
    found = getattr(torch.cpu, "get_capabilities", dict)()  # where torch cannot say: none
    return "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def card_has_bfloat16(device: str | torch.device) -> bool:
    """Without emulation: NVIDIA's from 2020 on."""
    if not torch.cuda.is_available():
        return True  # said elsewhere
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def computes_in(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of matrices comes out right; older systems of Apple's have no bfloat16."""
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        return bool((ones @ ones == 8).all())
    except (RuntimeError, TypeError, AssertionError):
        return False


# Each flag is in one of these lists. Those that must match decide what is learnt.
MUST_MATCH = (
    *("epochs", "learning_rate", "grad_clip", "dropout", "seed", "dtype", "from_weight"),
    *("max_seq_len", "packing", "heldout_fraction", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "intermediate_size", "use_moe"),
    *("optimizer", "lr_schedule", "warmup_ratio", "decay_ratio"),
)
# What states hold that were saved before there was the flag.
OLDER = {"optimizer": "adamw", "lr_schedule": "cosine", "warmup_ratio": 0.0, "decay_ratio": 0.4}
# How an update's rows are split, and what computes them: the same but for rounding. Their product
# with the number of ranks must match; accumulation_steps follows it.
SPLIT = ("batch_size", "accumulation_steps", "micro_batch_size", "device", "use_compile")
MAY_CHANGE = (
    # what these lead to must match
    *("preset", "data_path", "text_column", "tokenizer_path", "bad_records"),
    *("save_dir", "save_weight", "checkpoint_dir", "cache_dir", "checkpoint_mirror"),
    *("log_interval", "save_interval", "eval_interval", "eval_tokens", "use_wandb"),
    *("wandb_project", "num_workers", "timeout", "keep_states", "max_bad_updates"),
    *("from_resume", "resume_step", "skip_steps", "overwrite", *SPLIT),
    *("max_minutes", "price_per_hour", "dry_run", "anneal_from"),
)


def deciding_settings(args: argparse.Namespace, num_ranks: int, digests: dict[str, str]) -> dict:
    """Whatever changes the result of a run if it changes; saved, and compared on resume."""
    return {name: getattr(args, name) for name in MUST_MATCH} | {
        "rows per update": args.batch_size * args.accumulation_steps * num_ranks,
        "content of data_path": digests["data"][:16],
        "content of tokenizer_path": digests["tokenizer"][:16],
    }


def check_same_settings(saved: dict, given: dict) -> None:
    """Raises: SettingsError with a table of the settings that the saved run had otherwise."""
    saved = OLDER | saved
    rows = [
        (key, f"{shown(saved.get(key)):.60}", f"{shown(given.get(key)):.60}")
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key)
    ]
    if rows:
        table = [("setting", "saved", "given"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
        raise SettingsError(
            "--from_resume 1: these settings differ from the saved run's. Give the saved ones, or "
            "start another run with --save_weight NAME.\n  " + "\n  ".join(lines)
        )


def surroundings(args: argparse.Namespace, num_ranks: int) -> dict:
    """What a result depends on in its last bits only; saved, and told apart on resume."""
    return {name: str(getattr(args, name)) for name in SPLIT} | {
        "ranks": str(num_ranks), "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
    }


def keep_split(args: argparse.Namespace, state: dict, num_ranks: int) -> None:
    """Let accumulation follow the number of ranks and the batch size, whose product with it was
    saved: the updates stay those of the run. With the same flags, micro-batches stay, too.

    Raises: SettingsError naming the numbers of ranks that would do."""
    saved = state["surroundings"]
    rows, batch = state["settings"].get("rows per update"), args.batch_size
    micro = re.fullmatch(r"[1-9]\d{0,8}", saved.get("micro_batch_size", ""))
    if micro and args.micro_batch_size is None and saved.get("batch_size") == str(batch):
        args.micro_batch_size = int(micro[0])
    asked = str(args.accumulation_steps) != saved.get("accumulation_steps")
    if asked or not isinstance(rows, int) or rows < 1:
        return  # whether it fits shows in the settings
    if rows % (batch * num_ranks):
        fitting = [n for n in range(1, min(rows // batch, 9999) + 1) if rows % (batch * n) == 0]
        others = f"{', '.join(map(str, fitting))} ranks would do, or" if fitting else "give"
        raise SettingsError(
            f"--from_resume 1: an update of {rows} rows does not divide into batches of {batch} on "
            f"{num_ranks} ranks: {others} another --batch_size."
        )
    args.accumulation_steps = rows // (batch * num_ranks)


def skipped_updates(given: str) -> range:
    """``1207:1210`` -> updates 1207, 1208 and 1209. Raises: ValueError if it is no such pair."""
    first, end = map(int, (given or "0:0").split(":"))
    if not 0 <= first <= end:
        raise ValueError(given)
    return range(first, end)


def run_program(program: Callable[[], None]) -> int:
    """Run it; an error that people cause becomes one line on stderr and an exit status."""
    if os.environ.get("RANK", "0") == "0":
        for line in untried_versions():
            say(partial(print, file=sys.stderr), line)
    try:
        program()
    except KeyboardInterrupt:
        say(print, "stopped. --from_resume 1 goes on from the last saved state.")
        return 130
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            say(print, str(stop))
        return stop.exit_status
    except Exception as error:
        status, message = exit_status_of(error), str(error)
        if status == 1:
            raise
        if status == 6:
            message = f"{error}. What was saved before is intact."
        if status == 7:
            less = " ".join(getattr(error, "__notes__", ["a lower --micro_batch_size"]))
            message = (
                f"out of memory: {message.splitlines()[0] if message else 'main memory'} The same "
                f"updates need less with {less}."
            )
        if getattr(error, "speaks", os.environ.get("LOCAL_RANK", "0") == "0"):  # not each rank
            say(partial(print, file=sys.stderr), f"error: {message}")
        return status
    return 0
