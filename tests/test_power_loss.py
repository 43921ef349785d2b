"""Power losses, full disks, failing disks, rotten bits: the state before or the new one, always.

A power loss may keep any part of what was not synced, so no single run of a test could show much.
Here the operations of a save are recorded, and from them follows every folder that a power loss
at any moment may leave. All of them are looked into.
"""

import contextlib
import errno
import io
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, digest, tiny_model
from tests.launched import Operations
from tests.running import assert_same
from trainer import checkpoint, host
from trainer.checkpoint import (
    CheckpointError,
    is_good,
    list_states,
    newest_state,
    remove_partial_files,
    save_state,
    update_of,
)
from trainer.weights import describes, read_weights, save_weights

NAME = "run_8"
FOLDER = -1  # the folder's number, among those of its files
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def state(update: int, size: int = 40) -> dict:
    """Different in every number from that of another update; of several tensors, so that it is
    written in several pieces."""
    values = torch.arange(1, size + 1) * update
    return {"update": update, "values": values, "more": [*(values[:24] * 100).split(1)]}


def unlink(path: Path, missing_ok: bool = False) -> None:
    """Stands for ``Path.unlink``, which has an ``os`` of its own: by trainer/checkpoint.py's."""
    with contextlib.suppress(FileNotFoundError if missing_ok else ()):
        checkpoint.os.unlink(path)


@contextlib.contextmanager
def standing_for_os(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, trainer/checkpoint.py does what it does to files by ``operations``."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "os", operations)
        patch.setattr(host, "os", operations)
        patch.setattr(Path, "unlink", unlink)
        yield


# ---- what a power loss may leave ----------------------------------------------------------------


class Recorder(Operations):
    """Writes down what succeeded, of operations in one folder that is empty at first.

    Args: before: called before each operation, and may make it fail."""

    def __init__(self, before: Callable = lambda *args: None) -> None:
        super().__init__(before, self.note)
        self.operations: list[tuple] = []
        self.names: dict[str, int] = {}  # each file's number, by its name now
        self.opened: dict[int, int] = {}  # the same, by descriptor

    def note(self, kind: str, result: object, what: object, *more: object) -> None:
        if kind == "open":
            self.note_open(result, Path(what), *more)
        elif kind == "write":
            self.operations.append(("write", self.opened[what], bytes(more[0][:result])))
        elif kind == "fsync":
            self.operations.append(("fsync", self.opened[what]))
        elif kind == "close":
            del self.opened[what]
        elif kind == "replace":
            old, new = Path(what).name, Path(more[0]).name
            self.names[new] = self.names.pop(old)
            self.operations.append(("names", {old: None, new: self.names[new]}))
        elif kind == "unlink":
            del self.names[Path(what).name]
            self.operations.append(("names", {Path(what).name: None}))

    def note_open(self, descriptor: int, path: Path, flags: int, mode: int = 0) -> None:
        if path.is_dir():
            self.opened[descriptor] = FOLDER
            return
        if path.name not in self.names:
            self.names[path.name] = len(self.operations)  # a number that no other file has
            self.operations.append(("create", self.names[path.name]))
            self.operations.append(("names", {path.name: self.names[path.name]}))
        elif flags & os.O_TRUNC:
            self.operations.append(("empty", self.names[path.name]))
        self.opened[descriptor] = self.names[path.name]

    def returned(self) -> None:
        """What was to be saved is saved, says the trainer."""
        self.operations.append(("returned",))


def variants(synced: bytes, cached: bytes) -> set[bytes]:
    """What a file may hold: of bytes that are not synced, the disk has all, some, or only room."""
    if synced == cached:
        return {cached}
    half = cached[: len(cached) // 2]
    zeros = bytes(len(cached))
    return {synced, cached, b"", half, zeros, half + zeros[len(half) :]}


def crash_states(operations: list[tuple]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Every folder that a power loss may leave, and how many saves had returned by then.

    Of the changes of names since the folder was last synced, each may be lost or kept."""
    names, pending, synced, cached = {}, [], {}, {}
    num_returned, seen = 0, set()
    for operation in operations:
        match operation:
            case "create", file:
                synced[file] = cached[file] = b""
            case "empty", file:
                cached[file] = b""
            case "write", file, data:
                cached[file] += data
            case "names", change:
                pending.append(change)
            case "fsync", file if file != FOLDER:
                synced[file] = cached[file]
            case "fsync", _:
                for change in pending:
                    names |= change
                pending = []
            case ("returned",):
                num_returned += 1
        for kept in itertools.product((False, True), repeat=len(pending)):
            folder = dict(names)
            for change in itertools.compress(pending, kept):
                folder |= change
            files = {name: file for name, file in folder.items() if file is not None}
            held = (variants(synced[file], cached[file]) for file in files.values())
            for contents in itertools.product(*held):
                left = dict(zip(files, contents, strict=True))
                key = (num_returned, frozenset(left.items()))
                if key not in seen:
                    seen.add(key)
                    yield num_returned, left


def examine(
    operations: list[tuple], folder: Path, judge: Callable[[Path, int], set[str]]
) -> tuple[int, Counter]:
    """How many folders a power loss may leave, and in how many of them ``judge`` finds what."""
    num_states, faults = 0, Counter()
    folder.mkdir()
    for num_returned, files in crash_states(operations):
        for old in folder.iterdir():
            old.unlink()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        faults.update(judge(folder, num_returned))
        num_states += 1
    return num_states, faults


def judge_states(
    folder: Path, num_returned: int, saved: list[dict], min_generations: int, max_states: int
) -> set[str]:
    """What is wrong with a folder of states after ``num_returned`` saves of ``saved``."""
    faults = set()
    good = [path for path in list_states(folder, NAME) if is_good(path)]
    if len(good) < min(num_returned, min_generations):
        faults.add("too few generations")
    try:
        found, complaints = newest_state(folder, NAME)
    except CheckpointError:
        return faults | {"nothing left"}
    if complaints:
        faults.add("damaged")
    if found is None and num_returned:
        faults.add("nothing left")
    elif found is not None:
        number = found["save"]
        assert_same(found, saved[number - 1] | {"format": checkpoint.FORMAT})
        if number < num_returned:
            faults.add("older")
    remove_partial_files(folder, NAME)
    left = list(folder.iterdir())
    if len(left) > max_states or len(left) != len(list_states(folder, NAME)):
        faults.add("left over")
    return faults


def examine_saves(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    updates: tuple[int, ...],
    keep: int = 2,
    min_generations: int | None = None,
    change: Callable[[list], list] = list,
    recorder: Recorder | None = None,
) -> tuple[int, Counter]:
    """``examine`` what saves of states at these updates did, after a ``change`` of the record."""
    recorder = recorder or Recorder()
    (folder / "recorded").mkdir(parents=True)
    saved = [state(update) | {"save": i} for i, update in enumerate(updates, start=1)]
    with standing_for_os(recorder, monkeypatch):
        for update, content in zip(updates, saved, strict=True):
            save_state(folder / "recorded", NAME, update, content, keep)
            recorder.returned()
    generations = keep if min_generations is None else min_generations

    def judge(left: Path, num_returned: int) -> set[str]:
        return judge_states(left, num_returned, saved, generations, keep + 1)

    return examine(change(recorder.operations), folder / "left", judge)


def examine_overwriting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list], list] = list
) -> tuple[int, Counter]:
    """``examine`` what writing a file three times under one name did."""
    recorder = Recorder()
    (folder / "recorded").mkdir(parents=True)
    contents = [None, *(bytes([number]) * 1000 * number for number in (1, 2, 3))]
    with standing_for_os(recorder, monkeypatch):
        for content in contents[1:]:
            checkpoint.write_atomically(folder / "recorded" / "metrics.jsonl", content)
            recorder.returned()

    def judge(left: Path, num_returned: int) -> set[str]:
        path = left / "metrics.jsonl"
        found = path.read_bytes() if path.exists() else None
        if found not in contents:
            return {"torn"}
        return {"older"} if contents.index(found) < num_returned else set()

    return examine(change(recorder.operations), folder / "left", judge)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_after_a_power_loss_the_newest_state_is_the_last_one_saved_or_the_one_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """And so many generations are good; the next start finds no other file, nor any damaged."""
    updates = tuple(range(1, keep + 3))
    num_states, faults = examine_saves(tmp_path, monkeypatch, updates, keep)
    assert not faults, faults
    assert num_states > 300


def test_after_a_power_loss_an_overwritten_file_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_states, faults = examine_overwriting(tmp_path, monkeypatch)
    assert not faults, faults
    assert num_states > 20


def test_after_a_power_loss_weights_are_those_that_their_description_speaks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, folder = Recorder(), tmp_path / "recorded"
    folder.mkdir()
    written = []
    with standing_for_os(recorder, monkeypatch):
        for number in (1, 2):
            save_weights(folder / "run_8.pth", small_model(number), {"number": number})
            recorder.returned()
            written.append((folder / "run_8.pth").read_bytes())

    def judge(left: Path, num_returned: int) -> set[str]:
        path = left / "run_8.pth"
        number = 1 + written.index(path.read_bytes()) if path.exists() else 0
        described = max((n for n in (1, 2) if describes(path, {"number": n})), default=0)
        read = [read_weights(path)] if number else []
        assert all(len(weights) > 5 for weights in read)
        faults = {"older"} if min(number, described) < num_returned else set()
        return faults | ({"described too early"} if described > number else set())

    num_states, faults = examine(recorder.operations, tmp_path / "left", judge)
    assert not faults, faults
    assert num_states > 300


def small_model(seed: int) -> torch.nn.Module:
    """Weights of 5 KB."""
    return tiny_model(
        seed,
        hidden_size=8,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def in_one_write(operations: list[tuple]) -> list[tuple]:
    """The same with fewer moments at which power can be lost: all bytes of a file come at once."""
    joined = []
    for op in operations:
        if joined and op[0] == joined[-1][0] == "write" and op[1] == joined[-1][1]:
            joined[-1] = (*op[:2], joined[-1][2] + op[2])
        else:
            joined.append(op)
    return joined


def without_file_syncs(operations: list[tuple]) -> list[tuple]:
    return [op for op in operations if op[0] != "fsync" or op[1] == FOLDER]


def without_folder_syncs(operations: list[tuple]) -> list[tuple]:
    return [op for op in operations if op != ("fsync", FOLDER)]


def renamed_before_synced(operations: list[tuple]) -> list[tuple]:
    changed = list(operations)
    for i, (op, after) in enumerate(itertools.pairwise(operations)):
        if op[0] == "fsync" and after[0] == "names" and len(after[1]) == 2:
            changed[i : i + 2] = after, op
    return changed


def pruned_before_committed(operations: list[tuple]) -> list[tuple]:
    """What a save removes goes first, before anything of that save is written."""
    changed, one_save = [], []
    for op in operations:
        one_save.append(op)
        if op == ("returned",):
            first = [op for op in one_save if op[0] == "names" and [*op[1].values()] == [None]]
            changed += first + [op for op in one_save if op not in first]
            one_save = []
    return changed


def write_in_place(path: Path, content: bytes | Callable) -> Path:
    """A careless ``write_atomically``: one file, emptied and written again, is all there is."""
    data = content
    if callable(content):
        content(buffer := io.BytesIO())
        data = buffer.getvalue()
    path = path.with_name(path.name.replace("*", digest(data)))
    used = next(path.parent.glob(f"*{path.suffix}"), path)
    descriptor = checkpoint.os.open(used, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    checkpoint.os.write(descriptor, data)
    checkpoint.os.fsync(descriptor)
    checkpoint.os.close(descriptor)
    if used != path:
        checkpoint.os.replace(used, path)
    host.sync_folder(path.parent)
    return path


@pytest.mark.parametrize(
    ("change", "keep", "of_states", "of_files"),
    [
        # A state's name tells its bytes, so a torn one is passed over: for that of the save before.
        (without_file_syncs, 2, {"damaged", "older", "too few generations"}, {"torn"}),
        # What a save returned as committed is not there: the first one is lost, or all are.
        (without_folder_syncs, 2, {"older", "nothing left", "too few generations"}, {"older"}),
        (renamed_before_synced, 2, {"damaged"}, {"torn"}),
        (pruned_before_committed, 2, {"too few generations"}, set()),
        (pruned_before_committed, 1, {"nothing left", "too few generations"}, set()),
        ("in place", 1, {"nothing left"}, {"torn"}),
    ],
)
def test_a_careless_save_does_not_get_through_the_model_of_a_power_loss(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable | str,
    keep: int,
    of_states: set[str],
    of_files: set[str],
) -> None:
    if change == "in place":
        monkeypatch.setattr(checkpoint, "write_atomically", write_in_place)
        change = list

    def coarse(operations: list[tuple]) -> list[tuple]:
        return change(in_one_write(operations))

    _, faults = examine_saves(tmp_path / "states", monkeypatch, (1, 2, 3), keep, change=coarse)
    assert of_states <= set(faults), faults
    _, faults = examine_overwriting(tmp_path / "files", monkeypatch, coarse)
    assert of_files == set(faults), faults


def test_a_branch_that_the_run_went_back_from_stays_away_after_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, faults = examine_saves(tmp_path, monkeypatch, (1, 2, 3, 2), min_generations=1)
    assert not faults, faults


def test_a_new_folder_survives_a_power_loss_like_the_state_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, synced = {}, set()

    def note(kind: str, result: object, what: object, *more: object) -> None:
        if kind == "open":
            opened[result] = Path(what)
        elif kind == "fsync":
            synced.add(opened[what])

    with standing_for_os(Operations(lambda *args: None, note), monkeypatch):
        save_state(tmp_path / "runs" / "first", NAME, 1, state(1))
    assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "first"} <= synced


# ---- operations that fail -----------------------------------------------------------------------


class Fault:
    """Before the operation of this number, from 0: it fails. If ``lasting``, so does each later
    one of its kind; else it would succeed if tried again."""

    def __init__(self, number: int, code: int, lasting: bool) -> None:
        self.number, self.code, self.lasting = number, code, lasting
        self.count = itertools.count()
        self.kind: str | None = None  # of the operation that failed

    def __call__(self, kind: str, *args: object) -> None:
        now = next(self.count) == self.number
        if now:
            self.kind = kind
        if now or (self.lasting and kind == self.kind):
            if kind == "close":
                os.close(args[0])  # a file whose close fails is closed nevertheless
            raise OSError(self.code, os.strerror(self.code))


def kinds_of_operations(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``work`` does to files."""
    kinds = []
    with standing_for_os(Operations(lambda kind, *args: kinds.append(kind)), monkeypatch):
        work()
    return kinds


def two_states(folder: Path) -> Path:
    """A new folder with the states of updates 1 and 2."""
    for update in (1, 2):
        save_state(folder, NAME, update, state(update, size=25_000))
    return folder


def save_with_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, num_before_safe: int
) -> None:
    """Save a third state, and look at what there is after it and what was said.

    Args: num_before_safe: operations until the new state is safe, if none fails."""
    error = None
    with standing_for_os(Operations(fault), monkeypatch):
        try:
            save_state(folder, NAME, 3, state(3, size=25_000))
        except OSError as raised:
            error = raised
    told = (fault.number, fault.kind, os.strerror(fault.code), fault.lasting, error)
    assert fault.kind, told
    expected = {n: state(n, size=25_000) | {"format": checkpoint.FORMAT} for n in (2, 3)}
    assert_same(newest_state(folder, NAME, update=2)[0], expected[2])
    found, complaints = newest_state(folder, NAME)
    assert not complaints, told
    assert_same(found, expected[found["update"]])
    states = list_states(folder, NAME)
    assert sorted(folder.iterdir()) == sorted(states) and len(states) <= 3, told
    if fault.number >= num_before_safe:  # the oldest was to be removed
        assert found["update"] == 3, told
        assert error is None or os.strerror(fault.code) in str(error), told
    elif fault.lasting:
        assert re.fullmatch(
            rf"{os.strerror(fault.code)} while saving update 3 in {re.escape(str(folder))}: "
            rf"0\.2 MB needed, [\d,]+\.\d MB free; the newest state there is {states[0].name}",
            str(error),
        ), told
        made_room = 1 not in map(update_of, states)
        assert made_room == (fault.code != errno.EIO), told
    else:
        assert error is None and found["update"] == 3 and len(states) == 2, told


def fail_each(folder: Path, monkeypatch: pytest.MonkeyPatch, codes: Callable[[int], tuple]) -> int:
    """Each operation of a save fails, with each of the ``codes`` of its number. Returns how many
    saves that were."""
    given = two_states(folder / "given")
    counted = shutil.copytree(given, folder / "counted")
    kinds = kinds_of_operations(lambda: save_state(counted, NAME, 3, state(3)), monkeypatch)
    assert set(kinds) == {"open", "write", "fsync", "close", "replace", "unlink"}
    trials = [
        (number, code, lasting)
        for number in range(len(kinds))
        for code in codes(number)
        for lasting in (False, True)
    ]
    for number, code, lasting in trials:
        tried = shutil.copytree(given, folder / f"{number}_{code}_{lasting}")
        save_with_fault(tried, monkeypatch, Fault(number, code, lasting), kinds.index("unlink"))
    return len(trials)


def test_an_operation_that_fails_costs_no_state_and_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that lasts is told with its reason, the space needed and the space free."""
    assert fail_each(tmp_path, monkeypatch, lambda number: (CODES[number % 3],)) > 50


@pytest.mark.slow
def test_an_operation_that_fails_in_any_way_costs_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail_each(tmp_path, monkeypatch, lambda number: CODES) > 200


@pytest.mark.slow
def test_a_power_loss_after_an_operation_that_failed_costs_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk costs the older generation; what a failed sync was to save counts as lost."""
    one_save = kinds_of_operations(lambda: save_state(tmp_path, NAME, 1, state(1)), monkeypatch)
    num_states = 0
    for number, code in itertools.product(range(len(one_save)), CODES):
        recorder = Recorder(Fault(2 * len(one_save) + number, code, lasting=False))
        found, faults = examine_saves(
            tmp_path / f"{number}_{code}",
            monkeypatch,
            (1, 2, 3),
            min_generations=1,
            change=in_one_write,
            recorder=recorder,
        )
        assert not faults, (number, code, faults)
        num_states += found
    assert num_states > 3000


def test_what_could_not_be_removed_does_not_hide_the_reason_and_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_states(tmp_path)

    def fail(kind: str, *args: object) -> None:
        if kind in ("write", "unlink"):
            code = errno.EIO if kind == "write" else errno.EROFS
            raise OSError(code, os.strerror(code))

    saving = standing_for_os(Operations(fail), monkeypatch)
    with saving, pytest.raises(OSError, match="Input/output error while saving update 3"):
        save_state(tmp_path, NAME, 3, state(3))
    assert len(list(tmp_path.iterdir())) == 4
    assert len(remove_partial_files(tmp_path, NAME)) == 2
    assert [update_of(path) for path in sorted(tmp_path.iterdir())] == [1, 2]


def test_a_full_disk_on_which_nothing_can_be_removed_tells_the_space_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_states(tmp_path)

    def fail(kind: str, *args: object) -> None:
        if kind in ("write", "unlink"):
            code = errno.ENOSPC if kind == "write" else errno.EIO
            raise OSError(code, os.strerror(code))

    saving = standing_for_os(Operations(fail), monkeypatch)
    with saving, pytest.raises(OSError, match=r"No space left on device while .* MB needed"):
        save_state(tmp_path, NAME, 3, state(3))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_never_costs_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The newest is damaged, so the one before it is what the run went on from."""
    two_states(tmp_path)
    list_states(tmp_path, NAME)[0].write_bytes(b"damaged")
    fault = Fault(1, code, lasting=True)
    with standing_for_os(Operations(fault), monkeypatch), pytest.raises(OSError):
        save_state(tmp_path, NAME, 3, state(3))
    assert fault.kind == "write"
    assert newest_state(tmp_path, NAME)[0]["update"] == 1


def fail_each_of_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, codes: Callable[[int], tuple]
) -> int:
    """Each operation of writing weights fails. Returns how many writes that were."""
    for number in (1, 2):
        save_weights(folder / f"{number}" / "run_8.pth", small_model(number), {"number": number})
    old, new = ((folder / n / "run_8.pth").read_bytes() for n in ("1", "2"))
    assert old != new
    model = small_model(2)
    kinds = kinds_of_operations(
        lambda: save_weights(folder / "2" / "run_8.pth", model, {"number": 2}), monkeypatch
    )
    assert kinds.count("replace") == 2
    trials = [
        (number, code, lasting)
        for number in range(len(kinds))
        for code in codes(number)
        for lasting in (False, True)
    ]
    for number, code, lasting in trials:
        tried = shutil.copytree(folder / "1", folder / f"{number}_{code}_{lasting}")
        path, fault = tried / "run_8.pth", Fault(number, code, lasting)
        saving = standing_for_os(Operations(fault), monkeypatch)
        with saving, pytest.raises(OSError, match=os.strerror(code)):
            save_weights(path, model, {"number": 2})
        told = (number, fault.kind, os.strerror(code), lasting)
        assert path.read_bytes() in (old, new), told
        assert describes(path, {"number": 1}) or describes(path, {"number": 2}), told
        assert path.read_bytes() == new or describes(path, {"number": 1}), told
        assert {p.name for p in tried.iterdir()} == {"run_8.pth", "run_8.json"}, told
    return len(trials)


def test_an_operation_that_fails_leaves_weights_whole_and_no_older_than_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail_each_of_weights(tmp_path, monkeypatch, lambda n: (CODES[n % 3],)) > 100


@pytest.mark.slow
def test_an_operation_that_fails_in_any_way_leaves_weights_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail_each_of_weights(tmp_path, monkeypatch, lambda number: CODES) > 300


# ---- real disks and real processes --------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A disk in memory, that holds so much."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr}")
    try:
        yield folder
    finally:
        busy = subprocess.run(["umount", str(folder)], stderr=subprocess.DEVNULL).returncode
        if busy:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert not busy, "something on it was left open"


def free_bytes(disk: Path) -> int:
    return shutil.disk_usage(disk).free


def test_a_disk_for_two_states_takes_the_third_for_the_oldest(tmp_path: Path) -> None:
    size = save_state(tmp_path, NAME, 1, state(1, size=25_000)).stat().st_size
    with small_disk(tmp_path / "disk", size * 5 // 2) as disk:
        two_states(disk)
        for update in (3, 4):
            assert free_bytes(disk) < size
            save_state(disk, NAME, update, state(update, size=25_000))
            found, complaints = newest_state(disk, NAME)
            assert found["update"] == update and not complaints
            left = sorted(update_of(path) for path in disk.iterdir())
            assert left == [update - 1, update], "it gave up more than it had to"


def test_a_disk_full_to_any_degree_keeps_the_state_it_has(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        size = save_state(disk, NAME, 1, state(1, size=25_000)).stat().st_size
        whole = newest_state(disk, NAME)[0]
        pages = -(-size // os.sysconf("SC_PAGE_SIZE"))
        for tenth in range(10):
            room = (pages - 1) * tenth // 9 * os.sysconf("SC_PAGE_SIZE")
            filler = disk / "filler"
            filler.write_bytes(bytes(free_bytes(disk) - room))
            assert free_bytes(disk) == room < size
            with pytest.raises(OSError, match=r"No space left on device.*: 0\.2 MB needed, 0\.\d "):
                save_state(disk, NAME, 2, state(2, size=25_000))
            assert free_bytes(disk) == room, "something is left of it"
            filler.unlink()
            found, complaints = newest_state(disk, NAME)
            assert_same(found, whole)
            assert not complaints and len(list(disk.iterdir())) == 1
        save_state(disk, NAME, 2, state(2, size=25_000))


SAVE_TWICE = """
import sys, torch, types
config = sys.modules["model.model_minimind"] = types.ModuleType("model.model_minimind")
config.MiniMindConfig = object  # only a type there; importing it takes seconds
from trainer.checkpoint import save_state
for update in (1, 2):
    save_state(sys.argv[1], "run_8", update, {"values": torch.arange(1000) * update}, keep=1)
"""


def test_the_kernel_sees_bytes_synced_then_the_name_then_the_folder(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log, folder = tmp_path / "log", tmp_path / "states"
    calls = "openat,fsync,?rename,?renameat,renameat2,?unlink,unlinkat"  # ?: not on every machine
    done = subprocess.run(
        [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-y",
            "-s",
            "500",
            "-o",
            log,
            "-e",
            f"trace={calls}",
            sys.executable,
            "-c",
            SAVE_TWICE,
            folder,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if not log.exists() or not log.read_text():
        pytest.skip(f"strace may not trace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    seen = [line for line in log.read_text().splitlines() if str(folder) in line]
    state_file = re.escape(f"{folder}/{NAME}_resume_") + r"0000000\d_[0-9a-f]{32}\.safetensors"
    part = re.escape(f"{folder}/.{NAME}_resume_") + r"0000000\d_\.\d+-[0-9a-f]{8}\.part"
    opened = re.escape(str(folder)) + r'/?", O_RDONLY(?!.*O_DIRECTORY)'  # as listing it does not
    patterns = {
        "bytes": rf'openat\(.*"{part}", O_WRONLY\|O_CREAT\|O_EXCL',
        "sync": rf"fsync\(\d+<{part}>\) = 0",
        "name": rf'rename\w*\(.*"{part}",.*"{state_file}".* = 0',
        "folder": rf'openat\(.*"{opened}',
        "sync folder": rf"fsync\(\d+<{re.escape(str(folder))}>\) = 0",
        "remove": rf'unlink\w*\(.*"{state_file}"',
    }
    order = [kind for line in seen for kind in patterns if re.search(patterns[kind], line)]
    one_save = ["bytes", "sync", "name", "folder", "sync folder"]
    assert order[: len(one_save)] == one_save, seen
    assert order[len(one_save) : 2 * len(one_save) + 1] == [*one_save, "remove"], seen


# ---- bytes that are not those written -----------------------------------------------------------


def two_generations(folder: Path) -> tuple[Path, bytes]:
    """The newer of two states of 100 KB, and its bytes."""
    for update in (1, 2):
        path = save_state(folder, NAME, update, state(update, size=12_000))
    data = path.read_bytes()
    assert len(data) > 90_000
    return path, data


def assert_passed_over(damaged: Path) -> None:
    """It is named as damaged, and the state before it is used."""
    found, complaints = newest_state(damaged.parent, NAME)
    assert_same(found, state(1, size=12_000) | {"format": checkpoint.FORMAT})
    assert len(complaints) == 1 and f"{damaged} is damaged" in complaints[0]


def flip_and_cut(folder: Path, num_flips: int, num_cuts: int) -> None:
    """Flip single bits, and cut to lengths, drawn at random; each must show."""
    path, data = two_generations(folder)
    draw = random.Random(8)
    for bit in [0, 8 * len(data) - 1, *draw.sample(range(8 * len(data)), num_flips - 2)]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert_passed_over(path)
    for length in [0, len(data) - 1, *draw.sample(range(len(data)), num_cuts - 2)]:
        path.write_bytes(data[:length])
        assert_passed_over(path)
    path.write_bytes(data)
    found, complaints = newest_state(folder, NAME)
    assert found["update"] == 2 and not complaints


def test_a_flipped_bit_or_a_cut_anywhere_is_named_and_the_state_before_used(tmp_path: Path) -> None:
    flip_and_cut(tmp_path, num_flips=50, num_cuts=10)


@pytest.mark.slow
def test_no_flipped_bit_and_no_cut_of_many_gets_through(tmp_path: Path) -> None:
    flip_and_cut(tmp_path, num_flips=500, num_cuts=50)


@pytest.mark.slow
def test_a_block_of_zeros_anywhere_is_named_and_the_state_before_used(tmp_path: Path) -> None:
    path, data = two_generations(tmp_path)
    blocks = range(0, len(data), 4096)
    for start in blocks:
        zeroed = data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]
        assert zeroed != data
        path.write_bytes(zeroed)
        assert_passed_over(path)
    assert len(blocks) > 20


@pytest.mark.slow
def test_two_states_that_changed_places_are_both_named_and_neither_is_used(tmp_path: Path) -> None:
    newer, _ = two_generations(tmp_path)
    older = list_states(tmp_path, NAME)[1]
    newer.rename(tmp_path / "aside")
    older.rename(newer)
    (tmp_path / "aside").rename(older)
    with pytest.raises(CheckpointError, match=f"{newer} is damaged.*{older} is damaged"):
        newest_state(tmp_path, NAME)
