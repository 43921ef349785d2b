"""What others may have written, or a disk has damaged: named, passed over, and never waited for."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_full_sft
import train_pretrain
from tests.helpers import digest
from tests.running import newest_state, tiny_flags, train_and_kill, train_in_process
from tests.test_fine_tuning import sft_flags
from trainer import checkpoint, reading
from trainer.checkpoint import is_good, list_states, make_room, save_state
from trainer.checkpoint import newest_state as newest_of
from trainer.guard.mirror import Mirror, fetch_newest
from trainer.guard.run_folder import RUN_STATE, read_run_state, usable


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path, size: int = 2**28) -> None:
    with path.open("wb") as file:
        file.truncate(size)


STRANGE: dict[str, Callable[[Path], object]] = {
    "folder": folder,
    "pipe": os.mkfifo,
    "dangling link": dangling,
    "endless": endless,
    "sparse": sparse,
}


def newer_than(path: Path, data: bytes = b"") -> Path:
    """A name for a state of ten updates later, which tells these bytes."""
    name, _, _ = path.stem.rsplit("_", 2)
    update = checkpoint.update_of(path) + 10
    return path.with_name(f"{name}_{update:08d}_{digest(data)}.safetensors")


@pytest.mark.parametrize("kind", STRANGE)
def test_a_newest_state_that_cannot_be_read_is_named_and_the_one_before_it_used(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1)
    step = newest_state(tmp_path)["step"]
    newer = newer_than(list_states(tmp_path / "checkpoints", "pretrain_32")[0])
    STRANGE[kind](newer)
    output = train_in_process(tmp_path, epochs=1, from_resume=1)
    assert f"resuming after update {step}" in output and "nothing to do" in output
    if kind != "folder":  # which is no file of that name
        assert f"warning: {newer} " in output and "Using the state before it." in output


@pytest.mark.parametrize("kind", [*STRANGE, "damaged"])
def test_what_cannot_be_read_takes_no_good_state_s_place(tmp_path: Path, kind: str) -> None:
    """After the next save there are still two good ones."""
    train_and_kill(tmp_path, 12)
    (newest, *_) = list_states(tmp_path / "checkpoints", "pretrain_32")
    bad = newer_than(newest)
    if kind == "damaged":
        bad.write_bytes(newest.read_bytes()[:-1])
    else:
        STRANGE[kind](bad)
    train_in_process(tmp_path, from_resume=1)
    states = list_states(tmp_path / "checkpoints", "pretrain_32")
    assert len(states) == 2 and all(map(is_good, states))
    assert not bad.exists() and not bad.is_symlink()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_bad_sector_counts_as_damage(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = (save_state(tmp_path, "run_8", n, {"step": n}) for n in (1, 2))
    real = reading.open_regular

    def open_regular(path: Path) -> object:
        if path == newer:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(reading, "open_regular", open_regular)
    monkeypatch.setattr(checkpoint, "open_regular", open_regular)
    state, complaints = newest_of(tmp_path, "run_8")
    assert state and state["step"] == 1
    assert complaints == [f"{newer} cannot be read: {os.strerror(number)}."]
    make_room([newer, older])
    assert list_states(tmp_path, "run_8") == [older], "the one that is good was kept"
    assert is_good(older) and not is_good(newer)


def test_a_state_of_another_structure_is_passed_over(tmp_path: Path) -> None:
    """With the digest that its name tells, as from another program."""
    train_in_process(tmp_path, epochs=1)
    state = newest_state(tmp_path)
    del state["format"]
    save_state(tmp_path / "checkpoints", "pretrain_32", 90, state | {"records": [{"step": "x"}]})
    output = train_in_process(tmp_path, epochs=1, from_resume=1)
    assert "warning: " in output and "records[0]" in output
    assert f"resuming after update {state['step']}" in output


DEEP = "[" * 100_000
FILES = [
    "",
    "[]",
    "7",
    "null",
    DEEP,
    '{"a": ' + DEEP,
    "{}",
    '{"step": "x", "run": 7}',
    "\udcff",
    "{",
]


@pytest.mark.parametrize("text", FILES)
def test_json_that_is_not_ours_ends_no_run(tmp_path: Path, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    for place in ("out/pretrain_32.json", f"checkpoints/{RUN_STATE}"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(data)
    assert read_run_state(tmp_path / "checkpoints") == {}
    train_in_process(tmp_path, epochs=1, overwrite=1)
    for place in ("out/pretrain_32.json", f"checkpoints/{RUN_STATE}"):
        (tmp_path / place).write_bytes(data)
    train_in_process(tmp_path, epochs=1, from_resume=1)
    assert json.loads((tmp_path / "out/pretrain_32.json").read_text())["run"]["step"] > 0


@pytest.mark.parametrize("kind", STRANGE)
def test_a_description_that_is_no_file_is_none(tmp_path: Path, kind: str) -> None:
    STRANGE[kind](tmp_path / RUN_STATE)
    assert read_run_state(tmp_path) == {}


def test_json_is_held_only_if_it_is_small(tmp_path: Path) -> None:
    sparse(tmp_path / "a.json", 2**40)
    with pytest.raises(ValueError, match="larger than"):
        reading.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", [*STRANGE, "garbage"])
def test_what_a_mirror_holds_beside_its_good_states_is_passed_over(
    tmp_path: Path, kind: str
) -> None:
    train_in_process(tmp_path, epochs=1)
    (good, *_) = list_states(tmp_path / "checkpoints", "pretrain_32")
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    (there / good.name).write_bytes(good.read_bytes())
    bad = newer_than(there / good.name, b"garbage" if kind == "garbage" else b"")
    if kind == "garbage":  # with the digest that its name tells
        bad.write_bytes(b"garbage")
    elif kind == "sparse":
        sparse(bad, 2**43)  # more than is free here
    else:
        STRANGE[kind](bad)
    mirror = Mirror(str(there), "pretrain_32", print)
    try:
        path, complaints = fetch_newest(mirror, here, -1, usable)
    finally:
        mirror.finish(0)
    assert path == here / good.name and [p.name for p in here.iterdir()] == [good.name]
    assert len(complaints) <= 1 and all(bad.name in text or "mirror" in text for text in complaints)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, number: float, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1)
    path = tmp_path / "out" / "pretrain_32.pth"
    state = torch.load(path)
    state["model.norm.weight"][3] = number
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue())
    words = tiny_flags(tmp_path, from_weight="pretrain", save_weight="next")
    assert train_pretrain.main(words) == 4
    assert "model.norm.weight holds numbers that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*STRANGE, "deep"])
@pytest.mark.parametrize("name", ["meta.json", "tokens.bin"])
def test_a_cache_with_a_file_that_is_none_is_built_again(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    path.unlink()
    if kind == "deep":
        path.write_text(DEEP)
    else:
        STRANGE[kind](path)
    train_in_process(tmp_path, epochs=1, overwrite=1)
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", [DEEP, '{"config": {"hidden_size": 1e999}}', "[]"])
def test_an_odd_description_of_the_base_is_told_by_its_weights(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1)
    (tmp_path / "out" / "pretrain_32.json").write_text(text)
    assert train_full_sft.main(sft_flags(tmp_path, from_weight="pretrain")) in (0, 4)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("from_resume", [0, 1])
def test_weights_whose_states_are_gone_are_not_said_to_be_resumable(
    tmp_path: Path, from_resume: int, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1)
    for path in list_states(tmp_path / "checkpoints", "pretrain_32"):
        path.unlink()
    assert train_pretrain.main(tiny_flags(tmp_path, from_resume=from_resume)) == 4
    said = capsys.readouterr().err
    assert "pretrain_32.pth belongs to an earlier run. No state of it is left: " in said
    assert (
        "--from_weight pretrain trains its weights further" in said
        and "--from_resume 1 resumes" not in said
    )


def test_weights_whose_states_are_on_the_mirror_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = {"checkpoint_mirror": tmp_path / "there"}
    train_in_process(tmp_path, epochs=1, **mirror)
    for path in list_states(tmp_path / "checkpoints", "pretrain_32"):
        path.unlink()
    assert train_pretrain.main(tiny_flags(tmp_path, **mirror)) == 4
    assert "belongs to an earlier run. --from_resume 1 resumes it" in capsys.readouterr().err
