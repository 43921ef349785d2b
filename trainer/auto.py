"""--learning_rate auto and --batch_size auto: both from the sizes of the model and of the run."""

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from model.model_minimind import MiniMindForCausalLM
from trainer import distributed
from trainer.console import log
from trainer.errors import SettingsError, is_out_of_memory
from trainer.flags import AUTO, TrainConfig
from trainer.host import run_time
from trainer.muon import NUM_STEPS
from trainer.run import largest_divisor
from trainer.state import refuse_unless
from trainer.weights import get_model_params

USABLE = 0.8  # share of the time left that passes take; the rest is for optimizer, evaluations
SMALLEST_TOKENS = 10**5  # the rules were not looked at below
LARGEST_RATE = 4.5e-3  # of AdamW: for small models Step Law says more, which did harm
TOKENS_TIMED, TOKENS_TIMED_ON_CPU = 65536, 4096  # in a large pass, at most
# An update should keep an accelerator busy for so many times what launching a small pass takes the
# host: launching the optimizer's step, and moments in which the host is slower, come on top.
LAUNCHES = 2
MUON_SHARE = 0.25  # of the passes' operations, at most
FEWEST_UPDATES = 200
ROWS_ON_CPU = 16  # in a pass, at most, for its memory


def best_learning_rate(optimizer: str, num_weights: float, num_tokens: float) -> float:
    """The peak rate for a model with this many weights in its layers, over a run of this length,
    with updates of ``best_update_tokens``.

    Source: of AdamW, Step Law (Li et al. 2025, arXiv 2503.04715). Of Muon, our own runs of 0.8 to
    13 M weights, see docs/RECIPES.md: its best rate depends little on the model, and that it
    should fall for longer runs is made up for by their larger updates."""
    if optimizer == "muon":
        return 0.06 * num_weights**-0.2
    return min(1.79 * num_weights**-0.713 * num_tokens**0.307, LARGEST_RATE)


def best_update_tokens(num_tokens: float) -> float:
    """Tokens of an update over a run of this length. Source: Step Law."""
    return 0.58 * num_tokens**0.571


class PassTimes(NamedTuple):
    """Of a forward and backward pass on one rank, without compilation."""

    least: float  # seconds, of one row: on an accelerator, what launching the work takes
    each_row: float  # seconds, in a pass that is large


def muon_tokens(model: MiniMindForCausalLM, period: int) -> float:
    """Tokens of an update whose passes have MUON_SHARE of their operations again in Muon's step,
    if each matrix moves in every ``period``-th.

    Fewer would learn more from each token, but less in an hour."""
    config = model.config
    operations = 0.0  # of the iteration on matrices of r x c, r <= c
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim >= 2:
            r, c = sorted(parameter.shape[-2:])
            matrices = parameter.numel() / (r * c)
            operations += matrices * NUM_STEPS * (4 * r * r * c + 2 * r**3)
    multiplied = weights_in_layers(model) + config.vocab_size * config.hidden_size
    return operations / period / (MUON_SHARE * 6 * multiplied)


def launched_tokens(times: PassTimes, row_length: int) -> float:
    """Tokens that an accelerator works on while the host launches an update: fewer take as long.

    A power of two, so that two measurements seldom give two numbers."""
    return 2.0 ** math.ceil(math.log2(LAUNCHES * times.least / times.each_row * row_length))


def weights_in_layers(model: MiniMindForCausalLM) -> float:
    """Those that a token passes, without embedding and head."""
    config = model.config
    in_tables = config.vocab_size * config.hidden_size * (2 - int(config.tie_word_embeddings))
    return get_model_params(model, config)[1] - in_tables


def choose(
    args: TrainConfig,
    model: MiniMindForCausalLM,
    rows_per_epoch: int,
    state: dict | None,
    pass_times: Callable[[], PassTimes],
) -> TrainConfig:
    """The flags with a number for each ``auto``: on resume, that of the saved run.

    Args: pass_times: measures them; called on an accelerator, or if the length of the run is given
        as a time.
    Raises: SettingsError if the saved run's update does not divide among the ranks."""
    auto_rate, auto_rows = args.learning_rate == AUTO, args.batch_size == AUTO
    if not auto_rate and not auto_rows:
        return args
    ranks = distributed.world_size()
    if state is not None:
        found = state["settings"]
        rate, rows = found.get("learning_rate"), found.get("rows per update")
        refuse_unless(
            type(rate) is float and 0 < rate < math.inf and type(rows) is int and rows > 0,
            f"its learning rate is {rate!r:.20} and its rows per update {rows!r:.20}",
        )
        if auto_rows and rows % (ranks * args.accumulation_steps):
            raise SettingsError(
                f"--batch_size auto: an update of {rows} rows, as in the saved run, does not "
                f"divide among {ranks} ranks x {args.accumulation_steps} --accumulation_steps; use "
                f"numbers whose product divides it."
            )
        return with_choice(args, rate, rows)

    rows, times = rows_per_epoch * args.epochs, None
    if args.max_minutes or args.device != "cpu":
        times = PassTimes(*distributed.broadcast(tuple(pass_times())))
    if args.max_minutes and times:
        seconds = max(60 * args.max_minutes - run_time(), 1.0)
        rows = round(USABLE * seconds * ranks / times.each_row)
    tokens = max(rows * args.row_length, SMALLEST_TOKENS)
    weights, best = weights_in_layers(model), best_update_tokens(tokens)
    least = muon_tokens(model, args.muon_period) if args.optimizer == "muon" else 0.0
    if times and args.device != "cpu":
        least = max(least, ranks * launched_tokens(times, args.row_length))
    wanted = max(best, min(least, tokens / FEWEST_UPDATES))
    step = ranks * args.accumulation_steps * (args.micro_batch_size or 1)
    step *= 8 if wanted / args.row_length / step >= 16 else 1  # it should divide by many numbers
    rows_per_update = step * max(1, round(wanted / args.row_length / step))
    if not auto_rows:
        rows_per_update = args.batch_size * args.accumulation_steps * ranks
    # Noise falls with the size of an update, and so the rate may rise; by its square root.
    larger = rows_per_update * args.row_length / best
    rate = best_learning_rate(args.optimizer, weights, tokens) * math.sqrt(min(larger, 4.0))
    rate = float(f"{rate:.2g}")
    if not auto_rate:
        rate = args.learning_rate
    log(
        f"auto: --learning_rate {rate:g}, {rows_per_update:,} rows "
        f"({rows_per_update * args.row_length:,} tokens) per update, for {weights / 1e6:.2f}M "
        f"weights in layers and about {tokens / 1e6:,.2f}M tokens; see docs/RECIPES.md"
    )
    return with_choice(args, rate, rows_per_update)


def with_choice(args: TrainConfig, rate: float, rows_per_update: int) -> TrainConfig:
    """These flags, where they are ``auto``, with this rate and these rows per update."""
    if args.learning_rate == AUTO:
        args = dataclasses.replace(args, learning_rate=rate)
    if args.batch_size == AUTO:
        rows = rows_per_update // distributed.world_size()
        batch_size, micro = rows // args.accumulation_steps, args.micro_batch_size
        if micro is None and args.device == "cpu":
            micro = largest_divisor(rows, min(batch_size, ROWS_ON_CPU))
        args = dataclasses.replace(args, batch_size=batch_size, micro_batch_size=micro)
    return args


def pass_times(
    model: MiniMindForCausalLM, data: Any, autocast: AbstractContextManager
) -> PassTimes:
    """As measured on this rank, on rows of the dataset ``data``."""

    def seconds(num_rows: int) -> float:
        rows, found = data.__getitems__([*range(num_rows)]).to(model.device), []
        for _ in range(4):
            since = time.monotonic()
            with autocast:
                loss = model(**rows.model_inputs).loss
            loss.backward()
            loss.item()  # waits for the device
            model.zero_grad(set_to_none=True)
            found.append(time.monotonic() - since)
        return min(found[1:])

    limit = TOKENS_TIMED_ON_CPU if model.device.type == "cpu" else TOKENS_TIMED
    least, num_rows = seconds(1), min(max(1, limit // data.row_length), len(data))
    while num_rows > 1:
        try:
            return PassTimes(least, seconds(num_rows) / num_rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        model.zero_grad(set_to_none=True)
        num_rows //= 4
    return PassTimes(least, least)
