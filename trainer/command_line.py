"""From the words of a command line to a TrainConfig whose values are valid, alone and together.

What the dataclasses of flags.py declare becomes argparse's flags; presets, recipes and the sizes of
--from_weight become their defaults. One message names all that is wrong.
"""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from trainer.address import mirror_problems
from trainer.device import default_dtype, default_residual_dtype, device_problems
from trainer.errors import SettingsError, printable
from trainer.flags import (
    AUTO,
    GROUPS,
    LARGEST,
    PRESETS,
    PRETRAIN,
    RECIPES,
    Program,
    TrainConfig,
    config_type,
    skipped_updates,
)
from trainer.saved_settings import described_sizes


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows all defaults, and keeps the line breaks of the description."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others here."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        words = message.split() if message.startswith("unrecognized") else []
        matches = [f for w in words for f in get_close_matches(w, self._option_string_actions)]
        hint = f"Did you mean {matches[0]}? " if matches else ""
        self.exit(2, f"error: {printable(message)}. {hint}See --help.\n")


def number_or_auto(kind: type) -> Callable[[str], Any]:
    """What reads a number of this kind, or the word "auto"."""

    def read(word: str) -> Any:
        if word != "auto" and kind(word) == AUTO:
            raise ValueError
        return AUTO if word == "auto" else kind(word)

    read.__name__ = f"{kind.__name__} or auto"  # argparse shows it
    return read


def add_flags(parser: argparse.ArgumentParser, groups: tuple[type, ...] = GROUPS) -> None:
    """Add one flag per dataclass field to the parser, in one argument group per class."""
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        kinds = typing.get_type_hints(group)
        for declared in fields(group):
            metadata = declared.metadata
            names = [f"--{name}" for name in (declared.name, metadata.get("alias")) if name]
            default = declared.default
            if declared.default_factory is not dataclasses.MISSING:
                default = declared.default_factory()
            kind = kinds[declared.name]
            if isinstance(kind, types.UnionType):  # int | None
                kind = typing.get_args(kind)[0]
            if kind is bool:
                section.add_argument(*names, action="store_true", help=metadata["help"])
            elif kind == list[str]:
                section.add_argument(*names, nargs="+", default=default, help=metadata["help"])
            else:
                section.add_argument(
                    *names,
                    type=number_or_auto(kind) if metadata.get("auto") else kind,
                    default=default,
                    choices=metadata.get("choices"),
                    help=metadata["help"],
                )


def build_parser(description: str | None = None, program: Program = PRETRAIN) -> Parser:
    """The command line of train_pretrain.py, or of another program."""
    parser = Parser(description)
    add_flags(parser, GROUPS if program.flags is None else (*GROUPS, program.flags))
    return parser


def parse_flags(
    argv: list[str] | None, description: str | None = None, program: Program = PRETRAIN
) -> TrainConfig:
    """Parse flags over the defaults of preset, recipe and program, and the sizes of --from_weight.

    Raises: SettingsError, or exits with 2 (argparse)."""
    parser = build_parser(description, program)
    parser.set_defaults(**program.defaults)
    chosen, _ = parser.parse_known_args(argv)
    for defaults in (
        PRESETS[chosen.preset],
        RECIPES[chosen.recipe],
        program.defaults,
        program.presets.get(chosen.preset, {}),
    ):
        parser.set_defaults(**defaults)
    if program.is_chat:
        parser.set_defaults(**described_sizes(parser.parse_args(argv)))
    config = config_type(program)(**vars(parser.parse_args(argv)), program=program)
    check_flags(config)
    if config.dtype is None:
        config.dtype = default_dtype(config.device)
    if config.residual_dtype is None:
        config.residual_dtype = default_residual_dtype(config.device, config.dtype)
    if config.use_compile is None:
        config.use_compile = int(config.device.startswith("cuda"))
    return config


# ------------------------------------------------------------------------------------- checks


def range_problems(flags: Any, *groups: type) -> Iterator[str]:
    """A message for each number outside the bounds that its field declares.

    Args: groups: the dataclasses that declare the fields of ``flags``."""
    for declared in (declared for group in groups for declared in fields(group)):
        metadata, value = declared.metadata, getattr(flags, declared.name)
        if not isinstance(value, int | float) or (metadata.get("auto") and value == AUTO):
            continue
        least, above, most, below = (metadata.get(b) for b in ("least", "above", "most", "below"))
        above = -LARGEST if least is None and above is None else above
        below = LARGEST if most is None and below is None else below
        inside = (least is None or value >= least) and (above is None or value > above)
        if inside and (most is None or value <= most) and (below is None or value < below):
            continue
        if least is not None and most is not None:
            expected = f"{least:.7g} to {most:.7g}"
        else:
            words = (
                ("{:.7g} or more", least),
                ("above {:.7g}", above),
                ("at most {:.7g}", most),
                ("below {:.7g}", below),
            )
            expected = ", ".join(w.format(b) for w, b in words if b is not None)
        yield f"--{declared.name} is {value}, expected {expected}"


def check_flags(config: TrainConfig) -> None:
    """Raises: SettingsError that lists all invalid flags."""
    problems = [*range_problems(config, type(config))]

    def expect(holds: object, problem: str) -> None:
        if not holds:
            problems.append(problem)

    rows, micro = config.batch_size * config.accumulation_steps, config.micro_batch_size
    expect(
        micro is None or micro < 1 or rows % micro == 0 or config.batch_size == AUTO,
        f"--micro_batch_size is {micro}, expected a divisor of batch_size x "
        f"accumulation_steps = {rows}",
    )
    rate, weight_decay = config.learning_rate, config.weight_decay
    expect(
        problems or rate * weight_decay <= 1,
        f"--learning_rate {rate:g} x --weight_decay {weight_decay:g}, the share of a weight that "
        f"an update takes away, is {rate * weight_decay:g}, expected at most 1",
    )
    warmup, decay = config.warmup_ratio, config.decay_ratio
    expect(
        decay + max(warmup, 0) <= 1 or decay > 1,
        f"--decay_ratio is {decay}, expected at most 1 together with warmup_ratio ({warmup})",
    )
    expect(decay < 1 or not config.anneal_from, "--anneal_from needs a --decay_ratio below 1")
    new_and_untied = config.from_weight == "none" and not config.tie_word_embeddings
    expect(
        config.embedding_init == "random" or new_and_untied,
        "--embedding_init bigrams sets an output head of its own in a new model, expected "
        "--tie_word_embeddings 0 and no --from_weight, or --embedding_init random",
    )
    heads, most = config.look_back_heads, config.num_attention_heads
    expect(
        not heads or (config.embedding_init == "bigrams" and heads <= most),
        f"--look_back_heads is {'auto' if heads == AUTO else heads}, expected at most {most}, "
        f"with --embedding_init bigrams, or 0",
    )
    name = config.save_weight
    # These characters have no special meaning in a glob pattern.
    expect(
        re.fullmatch(r"\w[\w.+-]*", name),
        f"--save_weight is {name!r}, expected a name of letters, digits and ._+-",
    )
    rewinds = config.resume_step is None or config.from_resume
    expect(rewinds, "--resume_step is given, but --from_resume is 0; expected 1")
    try:
        skipped_updates(config.skip_steps)
    except ValueError:
        problems.append(
            f"--skip_steps is {config.skip_steps!r}, expected FIRST:END, e.g. 1207:1210"
        )
    if config.checkpoint_mirror:
        problems += mirror_problems(config.checkpoint_mirror)
        mirror = Path(config.checkpoint_mirror.removeprefix("file://")).resolve()
        separate = mirror != Path(config.checkpoint_dir).resolve()
        expect(separate, "--checkpoint_mirror is --checkpoint_dir, expected another disk")
    problems += device_problems(config.device)
    if problems:
        raise SettingsError(printable("; ".join(problems)) + ".")
