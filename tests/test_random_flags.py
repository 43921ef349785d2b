"""Any value of any flag is refused in one line, or fits what later stages compute and save."""

import contextlib
import io
import math
import typing
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_llm
import train_dpo
import train_full_sft
import train_pretrain
from tests.running import tiny_flags, write_corpus
from trainer.checkpoint import list_states, read_state
from trainer.command_line import parse_flags
from trainer.errors import SettingsError
from trainer.flags import LARGEST, PRETRAIN, TrainConfig, config_type

PROGRAMS = (PRETRAIN, train_full_sft.FULL_SFT, train_dpo.DPO)
QUIET = settings(database=None, deadline=None, derandomize=True)
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=20)  # no argument holds a NUL
INTS = st.one_of(st.integers(), st.integers(-(2**70), 2**70), st.integers(-5, 2000))
NUMBERS = st.one_of(INTS, st.floats(), st.floats(0, 1))
VALUES = st.one_of(NUMBERS.map(str), TEXTS)


def flags_of(config: type) -> list[str]:
    return [f.name for f in fields(config) if f.name != "program"]


def one_line(words: list[str], parse: typing.Callable) -> typing.Any:
    """What the flags are parsed to; None if they are refused, which takes one line."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            return parse(words)
    except SystemExit as stop:
        assert (stop.code, error.getvalue().count("\n")) == (2, 1)
    except SettingsError as refused:
        assert str(refused).isprintable()


def assert_usable(found: dict) -> None:
    for name, value in found.items():
        if isinstance(value, float):
            assert math.isfinite(value) or (name, value) == ("grad_clip", math.inf)
        elif isinstance(value, int):
            assert abs(value) < 2**62


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
@given(data=st.data())
@settings(QUIET, max_examples=200)
def test_a_random_value_of_a_trainers_flag_is_refused_or_usable(program, data) -> None:
    name = data.draw(st.sampled_from(flags_of(config_type(program))))
    words = ["--device", "cpu", f"--{name}={data.draw(VALUES)}"]
    config = one_line(words, lambda words: parse_flags(words, program=program))
    if config is not None:
        assert_usable(vars(config))
        assert config.batch_size * config.accumulation_steps < 2**62


@given(data=st.data())
@settings(QUIET, max_examples=200)
def test_a_random_value_of_a_flag_of_eval_llm_is_refused_or_usable(data) -> None:
    parser = eval_llm.build_parser()
    names = [a.option_strings[0] for a in parser._actions if a.dest != "help"]
    words = [f"{data.draw(st.sampled_from(names))}={data.draw(VALUES)}"]

    def parse(words: list[str]) -> dict:
        args = eval_llm.build_parser().parse_args(words)
        eval_llm.check_flags(args)
        return vars(args)

    assert_usable(one_line(words, parse) or {})


# What would only make a run large or long, and the most that is tried here.
CAPS = {
    **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "max_seq_len": 64},
    **{"num_attention_heads": 64, "num_key_value_heads": 64, "num_workers": 1, "epochs": 3},
    **{"batch_size": 64, "accumulation_steps": 64, "micro_batch_size": 64, "max_minutes": 0.02},
}
NUMERIC = [
    f
    for f in fields(TrainConfig)
    if f.type in (int, float, int | None, float | None) and not f.metadata["choices"]
]


@st.composite
def changes(draw: st.DrawFn) -> dict:
    """A numeric flag with a random value, or with one at a bound of its own."""
    declared = draw(st.sampled_from(NUMERIC))
    is_int = declared.type in (int, int | None)
    bounds = [declared.metadata[b] for b in ("least", "above", "most", "below")]
    edges = [edge for edge in bounds if edge is not None] + [LARGEST]
    step = (lambda e, sign: e + sign) if is_int else lambda e, sign: math.nextafter(e, sign * 1e308)
    near = [e for edge in edges for e in (edge, step(edge, 1), step(edge, -1))]
    value = draw(st.one_of(st.sampled_from(near), INTS if is_int else NUMBERS))
    cap, most = CAPS.get(declared.name, LARGEST), next(filter(None, bounds[2:]), LARGEST)
    return {declared.name: cap if cap < value <= most else value}  # what is beyond is refused


@pytest.mark.slow
@given(changed=changes())
@settings(QUIET, max_examples=60)
def test_a_run_with_a_random_number_ends_well_or_in_one_line(changed, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder / "corpus.jsonl")
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = train_pretrain.main(tiny_flags(folder, **{"epochs": 1} | changed))
        except SystemExit as stop:
            status = stop.code
    print(changed, status)
    assert status in (0, 2, 3, 4, 5, 7), changed
    assert error.getvalue().count("\n") == (status != 0), (changed, error.getvalue())
    if status == 0 and (states := list_states(folder / "checkpoints", "pretrain_32")):
        weights = read_state(states[0])["model"].values()
        assert all(torch.isfinite(weight).all() for weight in weights), changed
