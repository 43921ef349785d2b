"""Files made to harm: opening one runs no code from it, stays in its memory, ends in one line.

Weights are what torch.save wrote; states are safetensors. Each state here has the digest of its
bytes in its name, so that it comes past that check.
"""

import codecs
import contextlib
import copy
import io
import itertools
import json
import lzma
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import struct
import subprocess
import tarfile
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import eval_llm
import train_pretrain
from tests.helpers import ROOT, digest
from tests.launched import start_trainers, wait_for_all
from tests.running import (
    assert_same,
    files_with_times,
    mark_slow_except_every,
    newest_state,
    tiny_flags,
    train_in_process,
)
from trainer import weights
from trainer.checkpoint import list_states, read_state
from trainer.errors import CheckpointError
from trainer.guard.guard import Guard
from trainer.state import write_state
from trainer.weights import read_weights

NAME = "pretrain_32"
EMBEDDING = "model.embed_tokens.weight"  # (6400, 32); the optimizer's parameter 0
MATRIX = "model.layers.0.self_attn.k_proj.weight"  # (16, 32)
NORM = "model.layers.0.self_attn.q_norm.weight"  # (8,)
NUM_MUTATIONS = 200  # of each run of the tests
FUZZ_SECONDS = 120  # of the long fuzz
MIB = 2**20

# ----------------------------------------------------------------------- runs and their files

load_once = cache(weights.load_tokenizer)


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a third of the time of a start that is refused, and has no part in this."""
    for module in (train_pretrain, eval_llm, weights):
        monkeypatch.setattr(module, "load_tokenizer", load_once)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of 12 updates, with the states after updates 10 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    train_in_process(folder, epochs=1)
    return folder


@pytest.fixture(scope="module")
def in_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float16, with a scaler of gradients."""
    folder = tmp_path_factory.mktemp("in_half")
    train_in_process(folder, epochs=1, dtype="float16")
    return folder


def copied(trained: Path, folder: Path) -> Path:
    """A copy of a run without its states."""
    states = shutil.ignore_patterns("*_resume_*")
    shutil.copytree(trained, folder, ignore=states, dirs_exist_ok=True)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return copied(trained, tmp_path)


@cache
def midway(trained: Path) -> dict:
    """The state after update 10: two are left to do. Not to be changed."""
    return read_state(list_states(trained / "checkpoints", NAME)[1])


def to_bytes(content: object, **options: object) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def state_bytes(content: dict) -> bytes:
    """As a save writes it, without what keeps a save from writing names and values like these."""
    buffer, unchecked = io.BytesIO(), {"check_names": bool, "check_plain": bool}
    with mock.patch.multiple("trainer.state", **unchecked):
        write_state(content, buffer)
    return buffer.getvalue()


def put_state(folder: Path, content: bytes | dict, update: int = 10) -> Path:
    """Write a state of this content, or of these bytes."""
    data = content if isinstance(content, bytes) else state_bytes(content)
    path = folder / "checkpoints" / f"{NAME}_resume_{update:08d}_{digest(data)}.safetensors"
    path.write_bytes(data)
    return path


def put_weights(folder: Path, content: object) -> Path:
    """Write weights of the name "odd", likewise."""
    path = folder / "out" / "odd_32.pth"
    path.write_bytes(content if isinstance(content, bytes) else to_bytes(content))
    return path


def kept(folder: Path) -> dict:
    """All files but the locks, the log, and the one that says how the last start ended."""
    passing = ("run_state.json", ".lock", "log")
    found = files_with_times(folder)
    return {k: (t, digest(data)) for k, (t, data) in found.items() if not k.endswith(passing)}


def here(words: list[str], program=train_pretrain) -> tuple[int, str]:
    """Exit status and output of a program that runs in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        status = program.main(words)
    return status, output.getvalue()


def alone(words: list[str], log: Path) -> tuple[int, str]:
    """The same of the trainer in a process of its own, which it may crash: status < 0."""
    [status] = wait_for_all(start_trainers(words, log), timeout=30)
    return status, log.read_text(encoding="utf-8")


def error_of(status: int, output: str, expected_status: int = 4) -> str:
    """The one line that a program refuses with; for settings, a table follows."""
    assert status == expected_status, output[-3000:]
    assert "Traceback" not in output and "Warning" not in output, output
    assert "\x1b" not in output, "text from a file can colour the terminal"
    _, error = output.split("error: ")
    assert error.count("\n") == 1 or expected_status == 2, error
    return error


def refused_resume(
    folder: Path, expected_status: int = 4, apart: bool = False, **changes: object
) -> str:
    """Resume, which must be refused and leave all files as they are. Returns: the message."""
    before, words = kept(folder), tiny_flags(folder, epochs=1, from_resume=1, **changes)
    ended = alone(words, folder / "log") if apart else here(words)
    error = error_of(*ended, expected_status)
    assert kept(folder) == before
    return error


def refused_weights(folder: Path, apart: bool = False) -> list[str]:
    """Train from the weights "odd", and continue a text with them; both must be refused."""
    before, words = kept(folder), tiny_flags(folder, epochs=1, save_weight="new", from_weight="odd")
    trained = alone(words, folder / "log") if apart else here(words)
    words = ["--weight", str(folder / "out" / "odd_32.pth"), "--device", "cpu", "--prompt", "a"]
    continued = here([*words, "--max_new_tokens", "1"], program=eval_llm)
    errors = [error_of(*trained), error_of(*continued)]
    assert kept(folder) == before
    return errors


# -------------------------------------------------------------------------- archives by hand


def entries_of(data: bytes) -> dict[str, bytes]:
    """The entries of an archive by torch.save, without the folder they are in."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> tuple[bytes, bytes]:
    """The entries in a zip file, and its directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    data = buffer.getvalue()
    size, offset = struct.unpack_from("<2L", data, len(data) - 10)
    return data[:offset], data[offset : offset + size]


def joined(entries: bytes, directory: bytes, more: bytes = b"") -> bytes:
    """A zip file that ends as torch's do: for large ones, and once more for small ones."""
    num, size, offset = directory.count(b"PK\1\2"), len(directory), len(entries)
    end = offset + size + len(more)
    return (
        entries
        + directory
        + more
        + (
            struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, num, num, size, offset)
            + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, num, num, size, offset, 0)
        )
    )


def archive(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    return joined(*zipped(entries, method))


# -------------------------------------------------------------------------------------- code


class Call:
    """Unpickling it would call a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class WithAttribute:
    """Unpickled as an OrderedDict whose method ``keys`` something hides."""

    def __init__(self, harm: object) -> None:
        self.harm = harm

    def __reduce__(self) -> tuple:
        return OrderedDict, (), {"keys": self.harm}


CALLS = {  # what is to be imported, and a call of it that makes a folder
    "posix.mkdir": lambda marker: Call(os.mkdir, marker),
    "posix.system": lambda marker: Call(os.system, f"mkdir {marker}"),
    "eval": lambda marker: Call(eval, f"__import__('os').mkdir({marker!r})"),
    "exec": lambda marker: Call(exec, f"import os; os.mkdir({marker!r})"),
    "commands.call": lambda marker: Call(subprocess.call, ["mkdir", marker]),  # its old name
    "shutil.copytree": lambda marker: Call(shutil.copytree, str(ROOT / "docs"), marker),
    "pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(Call(os.mkdir, marker))),
}


@pytest.mark.parametrize("wanted", CALLS)
def test_what_a_file_asks_to_import_is_named_and_not_called(folder: Path, wanted: str) -> None:
    marker = folder / "ran"
    harm = CALLS[wanted](str(marker))
    pickle.loads(pickle.dumps(harm))
    shutil.rmtree(marker)  # so it would run
    expected = rf"asks to import \S*{re.escape(wanted)},"
    path = put_weights(folder, {EMBEDDING: torch.zeros(2, 2), "more": harm})
    for error in refused_weights(folder):
        assert str(path) in error and re.search(expected, error), error
    assert not marker.exists()


def deep(harm: object) -> object:
    """Inside of thirty dicts, lists and tuples."""
    for _ in range(10):
        harm = {"more": [(OrderedDict(more=harm), torch.ones(1))]}
    return harm


def before_zip(content: object) -> bytes:
    """As torch.save wrote before version 1.6."""
    return to_bytes(content, _use_new_zipfile_serialization=False)


def in_tar(harm: object) -> bytes:
    """As the first versions of torch wrote."""
    buffer, data = io.BytesIO(), pickle.dumps(harm, protocol=2)
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def packed(content: object, method: int) -> bytes:
    return archive(entries_of(to_bytes(content)), method)


def under_two_names(harm: object) -> bytes:
    """torch's reader does not tell capitals from small letters."""
    harmless = entries_of(to_bytes({"format": 2}))
    return archive(harmless | {"DATA.PKL": pickle.dumps(harm, protocol=2)})


def script(harm: object) -> bytes:
    """TorchScript's archives have code beside the content."""
    constants = {"constants.pkl": pickle.dumps(harm, protocol=2)}
    return archive(entries_of(to_bytes({"values": harm})) | constants)


FORMS = {
    "deep_inside": lambda harm: to_bytes(deep(harm)),
    "as_the_content": to_bytes,
    "as_a_name": lambda harm: to_bytes({("a", harm): 1}),
    "as_an_attribute": lambda harm: to_bytes(WithAttribute(harm)),
    "in_a_later_protocol": lambda harm: to_bytes({"x": harm}, pickle_protocol=4),
    "in_a_plain_pickle": lambda harm: pickle.dumps({"x": harm}),
    "in_the_first_protocol": lambda harm: pickle.dumps({"x": harm}, protocol=0),
    "before_zip": before_zip,
    "before_zip_and_an_archive": lambda harm: before_zip(harm) + to_bytes({"format": 2}),
    "behind_an_archive": lambda harm: to_bytes({"format": 2}) + pickle.dumps(harm),
    "in_a_tar_file": in_tar,
    "in_a_deflated_archive": lambda harm: packed({"x": harm}, zipfile.ZIP_DEFLATED),
    "in_an_lzma_archive": lambda harm: packed({"x": harm}, zipfile.ZIP_LZMA),
    "in_a_7z_file": lambda harm: b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24) + pickle.dumps(harm),
    "packed_as_a_whole": lambda harm: lzma.compress(pickle.dumps({"x": harm})),
    "in_torchscript": script,
    "under_two_names": under_two_names,
}


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_file_runs_code(folder: Path, form: str) -> None:
    marker = folder / "ran"
    data = FORMS[form](Call(os.mkdir, str(marker)))
    path = put_weights(folder, data)
    assert all(str(path) in error for error in refused_weights(folder))
    assert not marker.exists()


@pytest.mark.parametrize("form", ["deep_inside", "in_a_plain_pickle", "before_zip"])
def test_a_pickle_is_no_state_and_passed_over_for_the_good_one_before_it(
    folder: Path, trained: Path, form: str
) -> None:
    marker, good = folder / "ran", midway(trained)
    put_state(folder, good)
    path = put_state(folder, FORMS[form](Call(os.mkdir, str(marker))), update=11)
    output = train_in_process(folder, epochs=1, from_resume=1)
    assert re.search(rf"warning: {path} (cannot be loaded: |is damaged: )", output)
    assert "resuming after update 10" in output and not marker.exists()
    assert_same(newest_state(folder), newest_state(trained))


def test_only_what_tensors_need_is_imported(folder: Path) -> None:
    """torch itself would call these: they take memory, point outside of it, or convert text."""
    calls = {
        "bytearray": Call(bytearray, 5),
        "torch.FloatTensor": Call(torch.FloatTensor, 5),
        "torch._utils._rebuild_sparse_tensor": outside(torch.sparse_coo),
        "_codecs.encode": Call(codecs.encode, "x", "idna"),
        "torch.device": torch.device("cuda"),
    }
    for wanted, call in calls.items():
        put_weights(folder, {EMBEDDING: torch.zeros(2, 2), "more": call})
        for error in refused_weights(folder):
            assert re.search(rf"asks to import \S*{re.escape(wanted)},", error), error
    needed = OrderedDict(a=torch.nn.Parameter(torch.ones(2)), b=torch.ones(2, 3).half())
    assert read_weights(put_weights(folder, needed))["a"].sum() == 2


# ------------------------------------------------------------------------------------ memory


def opener(path: Path) -> Callable[[Path], dict]:
    """What reads a file of this ending."""
    return read_weights if path.suffix == ".pth" else read_state


def open_file(warm_up: Path, path: Path, log: str) -> None:
    """Write down what came of opening a file, and the MiB it took. For a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (4096 * MIB, 4096 * MIB))
    opener(path)(warm_up)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        opener(path)(path)
        outcome = "opened"
    except CheckpointError as error:
        outcome = f"refused: {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    Path(log).write_text(json.dumps((outcome, grown / 1024)), encoding="utf-8")


def in_a_process(target: Callable, *arguments: object, timeout: float = 60) -> int:
    """The exit status of a function that may crash its process."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=arguments)
    process.start()
    [status] = wait_for_all([process], timeout)
    return status


def large(num: int, size: int, copies: int) -> dict[str, bytes]:
    """The entries of ``num`` tensors of ``size`` zero bytes, of which only some are there."""
    values = {f"w{i}": torch.zeros(77, dtype=torch.float16) for i in range(num)}
    entries = entries_of(to_bytes(values))
    pickled = entries.pop("data.pkl").replace(b"K\x4d", b"J" + struct.pack("<i", size // 2))
    rest = {name: data for name, data in entries.items() if not name.startswith("data/")}
    return {"data.pkl": pickled} | rest | {f"data/{i}": bytes(size) for i in range(copies)}


def bomb() -> bytes:
    """300 MiB of zeros in 1.3 MiB."""
    return archive(large(1, 300 * MIB, 1), zipfile.ZIP_DEFLATED)


def bomb_with_two_directories() -> bytes:
    """One, where zipfile looks, says that nothing is packed. torch reads the other."""
    entries, directory = zipped(large(1, 300 * MIB, 1), zipfile.ZIP_DEFLATED)
    harmless = bytearray(directory)
    for match in re.finditer(b"PK\1\2", directory):
        harmless[match.start() + 10] = 0  # the method
    return joined(entries, directory, bytes(harmless))


def one_entry_by_many_names() -> bytes:
    """300 tensors of 1 MiB, each with a storage of its own, and all in the same bytes."""
    entries, directory = zipped(large(300, MIB, 1))
    last = directory[directory.rindex(b"PK\1\2") :]
    for number in range(1, 300):
        name = f"archive/data/{number}".encode()
        directory += last[:28] + struct.pack("<H", len(name)) + last[30:46] + name
    return joined(entries, directory)


def conversion() -> bytes:
    """One number that is to become 2**26 of another type."""
    single = torch.zeros(1, dtype=torch.uint8).expand(2**26)
    convert = torch._utils._rebuild_device_tensor_from_cpu_tensor
    return to_bytes({"x": Call(convert, single, torch.float64, "cpu", False)})


def by_hand(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header, which may say that it has another length."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(head) if length is None else length).to_bytes(8, "little") + head + data


def of_json(text: bytes, tensors: dict | None = None, data: bytes = b"") -> bytes:
    """A state of this JSON, with these entries of tensors in its header, and their bytes."""
    place = [len(data), len(data) + len(text)]
    header = {"json": {"dtype": "U8", "shape": [len(text)], "data_offsets": place}}
    return by_hand((tensors or {}) | header, data + text)


def entry(*shape: int, begin: int = 0, end: int = 0, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}


def many_of_one() -> bytes:
    """A thousand references to the same MiB."""
    text = json.dumps({"format": 3, "x": [{"$tensor": "w"}] * 1000}).encode()
    return of_json(text, {"w": entry(2**18, end=MIB)}, bytes(MIB))


def overlapping() -> bytes:
    """A thousand tensors in the same MiB."""
    names = [f"w{i}" for i in range(1000)]
    text = json.dumps({"format": 3, "x": [{"$tensor": name} for name in names]}).encode()
    return of_json(text, dict.fromkeys(names, entry(2**18, end=MIB)), bytes(MIB))


BOMBS = {  # of weights, of states; each with what the message says
    bomb: "does not compress",
    bomb_with_two_directories: "not what torch.save writes",
    one_entry_by_many_names: "overlap",
    conversion: "asks to import",
    many_of_one: "reference",
    overlapping: "invalid",
}


@pytest.mark.parametrize("make", BOMBS)
def test_a_small_file_cannot_take_much_memory(tmp_path: Path, make: Callable[[], bytes]) -> None:
    for folder in ("checkpoints", "out"):
        (tmp_path / folder).mkdir()
    if make in (many_of_one, overlapping):
        honest = put_state(tmp_path, {"format": 3, "x": [torch.zeros(2 * MIB, dtype=torch.uint8)]})
        path = put_state(tmp_path, make())
    else:
        honest = put_weights(tmp_path, archive(large(2, MIB, 2))).rename(tmp_path / "honest.pth")
        path = put_weights(tmp_path, make())
    assert path.stat().st_size < 2 * MIB
    log = tmp_path / "log"
    assert in_a_process(open_file, honest, path, str(log)) == 0
    outcome, grown = json.loads(log.read_text(encoding="utf-8"))
    assert outcome.startswith(f"refused: {path}") and grown < 32, (outcome, grown)
    assert re.search(BOMBS[make], outcome, re.IGNORECASE), outcome


MALFORMED = {  # states; what their message says
    "nothing": b"",
    "seven_bytes": bytes(7),
    "zeros": bytes(64),
    "text": b"not a state at all",
    "header_beyond_the_end": by_hand({}, length=2**20),
    "header_huge": by_hand({}, length=2**63),
    "header_not_json": by_hand(b"x" * 64),
    "header_a_list": by_hand(b"[1, 2]"),
    "no_json": by_hand({"w": entry(1, end=4)}, bytes(4)),
    "json_of_floats": by_hand({"json": entry(1, end=4)}, bytes(4)),
    "json_not_utf8": of_json(b"\xff\xfe{}"),
    "json_cut": of_json(b'{"format": 3'),
    "json_a_list": of_json(b"[1, 2]"),
    "json_a_number": of_json(b"7"),
    "json_deep": of_json(b"[" * 10**6 + b"]" * 10**6),
    "json_long_number": of_json(b'{"format": ' + b"9" * 10**5 + b"}"),
    "json_half_a_pair": of_json(b'{"format": 3, "x": "\\ud800"}'),
    "reference_to_nothing": of_json(b'{"format": 3, "x": {"$tensor": "w"}}'),
    "reference_by_a_list": of_json(b'{"format": 3, "x": {"$tensor": []}}'),
    "reference_to_the_json": of_json(b'{"format": 3, "x": {"$tensor": "json"}}'),
    "tensor_without_reference": of_json(b'{"format": 3}', {"w": entry(1, end=4)}, bytes(4)),
    "tensor_beyond_the_end": of_json(b"{}", {"w": entry(2**40, begin=9, end=2**42 + 9)}),
    "tensor_of_other_size": of_json(b"{}", {"w": entry(2, end=4)}, bytes(4)),
    "tensor_of_no_type": of_json(b"{}", {"w": entry(1, end=4, dtype="X9")}, bytes(4)),
    "size_that_overflows": of_json(b"{}", {"w": entry(2**62, 2**62, end=4)}, bytes(4)),
    "hole": of_json(b"{}", {"w": entry(1, begin=4, end=8)}, bytes(8)),
    "bytes_behind": of_json(b'{"format": 3}') + bytes(8),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_state_is_refused_in_one_line(folder: Path, case: str) -> None:
    path = put_state(folder, MALFORMED[case])
    assert re.search(rf"{path} (cannot be loaded: |is damaged: )", refused_resume(folder))


def test_a_state_of_an_older_format_is_refused_by_its_number(folder: Path, trained: Path) -> None:
    path = put_state(folder, to_bytes({"format": 2})).rename(
        folder / "checkpoints" / f"{NAME}_resume_00000010_{'0' * 32}.pth"
    )
    path = path.rename(path.with_suffix(".pth"))
    assert f"{path} has format 2 or older; this trainer reads format 3" in refused_resume(folder)
    error = error_of(*here(tiny_flags(folder, epochs=1)))
    assert f"{path} belongs to an earlier run" in error, "a new run must not be mixed with it"


# ------------------------------------------------------------------------------ crafted states


def put(value: object, *keys: object) -> Callable[[dict], None]:
    """A change of a state: this value in that place."""

    def change(state: dict) -> None:
        *path, last = keys
        for key in path:
            state = state[key]
        state[last] = value() if callable(value) else value

    return change


def without(*keys: object) -> Callable[[dict], None]:
    """A change of a state: nothing in that place."""

    def change(state: dict) -> None:
        *path, last = keys
        for key in path:
            state = state[key]
        del state[last]

    return change


def moment(value: object, name: str = "exp_avg") -> Callable[[dict], None]:
    """Something for the embedding's moments, and the kernel that reads them without a look."""

    def change(state: dict) -> None:
        put(value, "optimizer", "state", 0, name)(state)
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = True

    return change


def weight(value: object) -> Callable[[dict], None]:
    return put(value, "model", MATRIX)


def quantized() -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch wants to be rid of them
        return torch.quantize_per_tensor(torch.zeros(16, 32), 0.1, 0, torch.qint8)


def nested() -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # of its interface, which may change
        return torch.nested.nested_tensor([torch.zeros(16, 32)])


def outside(layout: torch.layout) -> Call:
    """A sparse matrix with a number far outside of it."""
    parts = [torch.tensor([[10**9], [10**9]])]
    if layout == torch.sparse_csr:
        parts = [torch.tensor([0, *[10**9] * 16]), torch.tensor([10**9])]
    data = (*parts, torch.ones(1), torch.Size([16, 32]))
    return Call(torch._utils._rebuild_sparse_tensor, layout, data)


def without_storage(*shape: int) -> Call:
    rebuild, strides = torch._utils._rebuild_wrapper_subclass, (shape[1], 1)
    place = (torch.strided, "cpu", False)
    return Call(rebuild, torch.nn.Parameter, torch.float32, shape, strides, 0, *place)


def generator(words_left: int, next_word: int) -> Tensor:
    """The state of torch's generator, which says how many of 624 words are left, and which."""
    state = torch.Generator().get_state()
    state[8:12] = torch.tensor([words_left], dtype=torch.int32).view(torch.uint8)
    state[16:24] = torch.tensor([next_word]).view(torch.uint8)
    return state


def endless() -> list:
    """Lists of two lists each, sixty deep; written once each."""
    part = []
    for _ in range(60):
        part = [part, part]
    return part


def in_itself() -> list:
    part = []
    part.append(part)
    return part


FAR = 2**20, 2**20

TENSORS = {  # each in a process of its own: it may write where it likes
    "weight_of_other_shape": (weight(torch.zeros(8, 32)), rf"{MATRIX} is \(8, 32\).*\(16, 32\)"),
    "weight_of_no_dimension": (weight(torch.tensor(0.0)), rf"{MATRIX} is \(\) "),
    "weight_float64": (weight(torch.zeros(16, 32).double()), rf"{MATRIX} is .*float64"),
    "weight_float16": (weight(torch.zeros(16, 32).half()), rf"{MATRIX} is .*float16"),
    "weight_int64": (weight(torch.zeros(16, 32).long()), rf"{MATRIX} is .*int64"),
    "weight_missing": (without("model", MATRIX), f"lacks {MATRIX}"),
    "weight_of_no_layer": (put(torch.zeros(1), "model", "odd"), "has odd"),
    "weight_that_is_text": (weight("x"), f"{MATRIX} is a .*, expected Tensor"),
    "weight_that_is_a_list": (weight([0.0] * 512), f"{MATRIX} is a .*, expected Tensor"),
    "weight_not_finite": (weight(torch.full((16, 32), torch.nan)), f"{MATRIX} is not finite"),
    "moment_of_one_number": (moment(torch.zeros(1)), r"0\.exp_avg is \(1,\).*\(6400, 32\)"),
    "moment_float64": (moment(torch.zeros(6400, 32).double()), r"0\.exp_avg is .*float64"),
    "moment_half_sq": (moment(torch.zeros(6400, 32).half(), "exp_avg_sq"), "exp_avg_sq is .*16"),
    "moment_missing": (without("optimizer", "state", 0, "exp_avg"), "optimizer.0 lacks exp_avg"),
    "moment_infinite": (moment(torch.full((6400, 32), torch.inf)), "exp_avg is not finite"),
    "steps_of_many": (moment(torch.zeros(10**6), "step"), r"step is \(1000000,\)"),
    "steps_int64": (moment(torch.tensor(3), "step"), "step is .*int64"),
    "steps_number": (moment(3.0, "step"), "step is a .*, expected Tensor"),
    "generator_too_short": (put(torch.zeros(9, dtype=torch.uint8), "rng", 0, "torch"), "size"),
    "generator_empty": (put(torch.zeros(0, dtype=torch.uint8), "rng", 0, "torch"), "size"),
    "generator_of_floats": (put(torch.zeros(5056), "rng", 0, "torch"), "ByteTensor|size"),
    "generator_of_ones": (
        put(torch.full((5056,), 255, dtype=torch.uint8), "rng", 0, "torch"),
        "random generators",
    ),
    "generator_behind_its_end": (put(generator(624, 624), "rng", 0, "torch"), "random generators"),
    "generator_before_its_start": (
        put(generator(624, 624 - 2**32), "rng", 0, "torch"),
        "random generators",
    ),
}


def changed(trained: Path, change: Callable) -> dict:
    """The state after update 10, changed."""
    state = copy.deepcopy(midway(trained))
    change(state)
    return state


@pytest.mark.parametrize("case", mark_slow_except_every(3, TENSORS))
def test_a_state_with_crafted_tensors_is_refused_before_one_is_used(
    folder: Path, trained: Path, case: str
) -> None:
    change, expected = TENSORS[case]
    put_state(folder, changed(trained, change))
    error = refused_resume(folder, apart=True)
    assert re.search(expected, error), error


HUGE = 10**400
LONG = "x" * 10**5

VALUES = {
    "weights_list": (put([1], "model"), "model is a list"),
    "optimizer_none": (put(None, "optimizer"), "optimizer is a NoneType"),
    "optimizer_without_state": (without("optimizer", "state"), "optimizer lacks state"),
    "optimizer_more": (put({}, "optimizer", "state", 99), "optimizer lacks nothing, and has 99"),
    "optimizer_field": (moment(torch.zeros(1), "max_exp_avg_sq"), "has max_exp_avg_sq"),
    "groups_none": (put(None, "optimizer", "param_groups"), "param_groups is a NoneType"),
    "groups_of_text": (put("xx", "optimizer", "param_groups"), "param_groups is a str"),
    "rows_negative": (put(-8, "progress", "rows_seen"), "saw -8 of 91 rows"),
    "rows_beyond": (put(99, "progress", "rows_seen"), "saw 99 of 91 rows"),
    "rows_between_updates": (put(79, "progress", "rows_seen"), "saw 79 of 91 rows in 10 updates"),
    "rows_huge": (put(HUGE, "progress", "rows_seen"), "too big|saw"),
    "rows_float": (put(80.0, "progress", "rows_seen"), "rows_seen is a float, expected int"),
    "rows_text": (put("80", "progress", "rows_seen"), "rows_seen is a str, expected int"),
    "rows_bool": (put(True, "progress", "rows_seen"), "rows_seen is a bool, expected int"),
    "rows_missing": (without("progress", "rows_seen"), "progress lacks rows_seen"),
    "updates_negative": (put(-1, "progress", "step"), "80 of 91 rows in -1 updates of 8"),
    "updates_of_another_run": (put(9, "progress", "step"), "80 of 91 rows in 9 updates of 8"),
    "updates_said_twice": (put(9, "step"), "10 updates.* 9"),
    "tokens_negative": (put(-5, "progress", "tokens_seen"), "tokens_seen is -5"),
    "tokens_huge": (put(HUGE, "progress", "tokens_seen"), "too big|tokens_seen"),
    "labels_huge": (put(HUGE, "progress", "interval_labels"), "too big|interval_labels"),
    "labels_negative": (put(-1, "progress", "interval_labels"), "interval_labels is -1"),
    "nats_nan": (put(torch.nan, "progress", "interval_nats"), "interval_nats is nan"),
    "nats_infinite": (put(torch.inf, "progress", "interval_nats"), "interval_nats is inf"),
    "evaluated_later": (put(11, "progress", "evaluated_step"), "evaluated_step is 11"),
    "counter_more": (put(1, "progress", "odd"), "progress lacks nothing, and has odd"),
    "counters_list": (put([1], "progress"), "progress is a list"),
    "python_too_short": (put((3, (1, 2), None), "rng", 0, "python"), "random generators"),
    "python_version": (put((9, (1,) * 625, None), "rng", 0, "python"), "random generators"),
    "python_place": (put((3, (1,) * 624 + (700,), None), "rng", 0, "python"), "random gen"),
    "python_text": (put((3, ("x",) * 625, None), "rng", 0, "python"), "random generators"),
    "python_empty": (put([], "rng", 0, "python"), "random generators"),
    "python_dict": (put({}, "rng", 0, "python"), "python is a dict"),
    "python_keeps_text": (
        lambda state: put((*state["rng"][0]["python"][:2], "x"), "rng", 0, "python")(state),
        "random generators",
    ),
    "cuda_text": (put("x", "rng", 0, "cuda"), "cuda is a str"),
    "generators_none": (put(None, "rng"), "rng is a NoneType"),
    "generators_empty": (put([], "rng"), "no random generators"),
    "generators_of_one": (put(3, "rng", 0), r"rng\[0\] is a int"),
    "generators_missing": (without("rng", 0, "torch"), r"rng\[0\] lacks torch"),
    "settings_none": (put(None, "settings"), "settings is a NoneType"),
    "settings_list": (put([1], "settings"), "settings is a list"),
    "settings_tensor": (put(torch.zeros(2), "settings", "seed"), "seed is a Tensor"),
    "rounding_text": (put("x", "rounding"), "rounding is a str"),
    "rounding_tensor": (put(torch.zeros(2), "rounding", "threads"), "threads is a Tensor"),
    "records_text": (put("x", "records"), "records is a str"),
    "records_of_numbers": (put([1], "records"), r"records\[0\] is a int"),
    "records_of_tensors": (put([torch.zeros(2)], "records"), r"records\[0\] is a Tensor"),
    "record_with_tensor": (put(torch.zeros(2), "records", 0, "loss"), "loss is a Tensor"),
    "record_with_lists": (put([[[1]]], "records", 0, "loss"), "loss is a list"),
    "record_without_step": (without("records", 0, "step"), "step is a NoneType"),
    "record_with_numbered_field": (put(1, "records", 0, 7), r"a name in records\[0\] is a int"),
    "record_with_odd_texts": (put({"a": 1}, "records", 0, "continuations"), "a is a int"),
    "rollbacks_none": (put(None, "rollbacks"), "rollbacks is a NoneType"),
    "rollbacks_of_numbers": (put([1], "rollbacks"), r"rollbacks\[0\] is a int"),
    "rollback_of_three": (put([[1, None, None]], "rollbacks"), r"rollbacks\[0\]"),
    "rollback_of_text": (put([[1, "a"]], "rollbacks"), r"rollbacks\[0\]"),
    "rollback_of_tensors": (put([[1, torch.zeros(3)]], "rollbacks"), r"rollbacks\[0\]"),
    "plan_text": (put("x", "plan"), "plan is a str"),
    "plan_of_text": (put("x", "plan", "total_rows"), r"plan\.total_rows is a str"),
    "plan_short": (without("plan", "from_row"), "plan lacks from_row"),
    "plan_long": (put(1, "plan", "odd"), "plan lacks nothing, and has odd"),
    "plan_of_fewer_rows": (put(1, "plan", "total_rows"), r"its plan is \(1, 0, 0"),
    "plan_of_half_rows": (put(80.5, "plan", "total_rows"), "total_rows is a float"),
    "plan_huge": (put(HUGE, "plan", "total_rows"), "too big|its plan is"),
    "plan_of_other_epochs": (put(1000, "plan", "total_rows"), "its plan is"),
    "plan_changed_later": (put(2000, "plan", "from_row"), "its plan is"),
    "plan_share": (put(1.5, "plan", "from_share"), "its plan is"),
    "seconds_not_finite": (put(torch.nan, "seconds_spent"), "its plan is"),
    "seconds_text": (put("x", "seconds_spent"), "seconds_spent is a str"),
    "latest_list": (put([1], "latest"), "latest is a list"),
    "latest_tensor": (put(torch.zeros(2), "latest", "loss"), "loss is a Tensor"),
    "latest_text": (put("x", "latest", "loss"), "loss is a str"),
    "tracker_list": (put([1], "wandb_id"), "wandb_id is a list"),
    "step_text": (put("a", "step"), "step is a str"),
    "step_tensor": (put(torch.zeros(3), "step"), "step is a Tensor"),
    "format_missing": (without("format"), "format None"),
    "format_text": (put("3", "format"), "format '3'.*reads format 3"),
    "format_long": (put(LONG, "format"), "format 'x{1,40}.{0,3};"),
    "format_later": (put(4, "format"), "format 4.*reads format 3"),
    "format_float": (put(3.0, "format"), "format 3.0"),
    "format_tensor": (put(torch.tensor(3), "format"), "format Tensor"),
    "scaler_where_none_is": (put({"scale": 1.0}, "scaler"), "scaler lacks nothing, and has scale"),
    "name_with_a_line_break": (put(1, "settings", "a\nerror: b"), "one of its names"),
    "name_with_colours": (put(torch.zeros(1), "model", "\x1b[31m"), "names"),
    "name_without_end": (put(torch.zeros(1), "model", LONG), "names"),
    **{
        f"no_{part}": (without(part), f"lacks {part}")
        for part in (
            *("model", "optimizer", "scaler", "settings", "rounding", "progress", "latest"),
            *("records", "rollbacks", "plan", "rng", "wandb_id", "step"),
        )
    },
}


@pytest.mark.parametrize("case", mark_slow_except_every(3, VALUES))
def test_a_state_with_crafted_values_is_refused_in_one_line(
    folder: Path, trained: Path, case: str
) -> None:
    change, expected = VALUES[case]
    path = put_state(folder, changed(trained, change))
    error = refused_resume(folder)
    assert re.search(expected, error) and len(error) < 600 + 3 * len(str(path)), error


def test_weights_that_torch_warns_of_are_refused(folder: Path) -> None:
    """In a process of its own: in this one a warning is an error already."""
    put_weights(folder, to_bytes(weights_of(folder), pickle_protocol=3))
    assert all("protocol 3" in error for error in refused_weights(folder, apart=True))


SETTINGS = {
    "seed": 43,
    "rows per update": 0,
    "content of data_path": "a\nb\x1b[31m",
    "dtype": None,
    "max_seq_len": LONG,
    "odd": 1,
}


@pytest.mark.parametrize("name", mark_slow_except_every(3, SETTINGS))
def test_crafted_settings_are_refused_as_those_of_another_run(
    folder: Path, trained: Path, name: str
) -> None:
    put_state(folder, changed(trained, put(SETTINGS[name], "settings", name)))
    error = refused_resume(folder, expected_status=2)
    assert error.count("\n") == 3 and name in error and len(error) < 600, error


@pytest.mark.parametrize("rows", [-8, 2.5, "8", 10**18 + 1, None])
def test_crafted_rows_per_update_are_refused(folder: Path, trained: Path, rows: object) -> None:
    """In a process of its own: they could be counted up to."""
    put_state(folder, changed(trained, put(rows, "settings", "rows per update")))
    error = refused_resume(folder, expected_status=2, apart=True)
    assert "rows per update" in error or "does not divide" in error


SCALERS = {
    "nan": (put(torch.nan, "scaler", "scale"), "scale"),
    "zero": (put(0.0, "scaler", "scale"), "scale"),
    "negative": (put(-1.0, "scaler", "scale"), "scale"),
    "infinite": (put(torch.inf, "scaler", "scale"), "scale"),
    "text": (put("1", "scaler", "scale"), "scale is a str"),
    "missing": (without("scaler", "scale"), "scaler lacks scale"),
    "empty": (put({}, "scaler"), "scaler lacks scale"),
    "other_growth": (put(9.0, "scaler", "growth_factor"), "growth_factor"),
    "other_interval": (put(0, "scaler", "growth_interval"), "growth_interval"),
    "tracker_beyond": (put(2**40, "scaler", "_growth_tracker"), "_growth_tracker"),
    "tracker_negative": (put(-1, "scaler", "_growth_tracker"), "_growth_tracker"),
}


def test_a_state_with_a_crafted_scaler_is_refused(in_half: Path, tmp_path: Path) -> None:
    folder = copied(in_half, tmp_path)
    for case, (change, expected) in SCALERS.items():
        path = put_state(folder, changed(in_half, change))
        error = refused_resume(folder, dtype="float16")
        assert re.search(expected, error), (case, error)
        path.unlink()
    put_state(folder, midway(in_half))
    train_in_process(folder, epochs=1, from_resume=1, dtype="float16")
    assert_same(newest_state(folder), newest_state(in_half))


class Shadowed(OrderedDict):
    """Unpickled as the weights it was made of, with attributes that stand for its methods."""

    def __reduce__(self) -> tuple:
        attributes = {"keys": OrderedDict, "get": OrderedDict, "_metadata": [1]}
        return OrderedDict, (), attributes, None, iter(self.items())


def test_attributes_of_weights_are_not_taken_from_their_file(folder: Path) -> None:
    own = weights_of(folder)
    assert_same(read_weights(put_weights(folder, Shadowed(own))), own)


def other_hyperparameters(state: dict) -> None:
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": 9.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 5.0}
        group |= {"fused": False, "foreach": True, "maximize": True, "odd": 1}


@pytest.mark.parametrize(
    "change", [lambda state: None, other_hyperparameters, put([], "optimizer", "param_groups")]
)
def test_what_a_run_decides_itself_is_not_taken_from_a_state(
    folder: Path, trained: Path, change: Callable
) -> None:
    put_state(folder, changed(trained, change))
    train_in_process(folder, epochs=1, from_resume=1)
    assert_same(newest_state(folder), newest_state(trained))


def test_a_state_that_does_not_fit_is_not_passed_over_for_an_older_one(
    folder: Path, trained: Path
) -> None:
    put_state(folder, midway(trained))
    put_state(folder, changed(trained, weight(torch.zeros(1))), update=11)
    assert MATRIX in refused_resume(folder)


def test_nothing_is_copied_into_the_run_before_all_is_checked(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is checked last."""
    restore, seen = Guard.begin, []

    def watched(guard: Guard, run: train_pretrain.Run, state: dict, num_bad: int) -> bool:
        def content() -> dict:
            scaler, weights = run.scaler.state_dict(), run.model.state_dict()
            return copy.deepcopy([weights, run.optimizer.state_dict(), scaler, run.step])

        before = content()
        try:
            return restore(guard, run, state, num_bad)
        finally:
            assert_same(content(), before)
            seen.append(run)

    monkeypatch.setattr(Guard, "begin", watched)
    last = {
        "weights": weight(torch.zeros(1)),
        "rows": put(99, "progress", "rows_seen"),
        "moments": put(torch.zeros(1), "optimizer", "state", 23, "exp_avg_sq"),
        "scaler": put({"scale": 1.0}, "scaler"),
        "generators": put((3, (1, 2), None), "rng", 0, "python"),
    }
    for change in last.values():
        path = put_state(folder, changed(trained, change))
        refused_resume(folder)
        path.unlink()
    assert len(seen) == len(last)


# ---------------------------------------------------------------------------- crafted weights


def weights_of(folder: Path) -> dict[str, Tensor]:
    """What that run exported."""
    return torch.load(folder / "out" / f"{NAME}.pth", weights_only=True)


NO_MATRIX = "real numbers|cannot be loaded|floating"

WEIGHTS = {
    "other_shape": (put(torch.zeros(8, 32), MATRIX), r"[kv]_proj\.weight is \("),
    "no_dimension": (put(torch.tensor(0.0), MATRIX), f"{MATRIX} is|no MiniMind weights"),
    "int64": (put(torch.zeros(16, 32).long(), MATRIX), NO_MATRIX),
    "complex": (put(torch.zeros(16, 32) * 1j, MATRIX), NO_MATRIX),
    "bool": (put(torch.zeros(16, 32).bool(), MATRIX), NO_MATRIX),
    "sparse": (put(lambda: torch.ones(16, 32).to_sparse(), MATRIX), NO_MATRIX),
    "sparse_outside": (put(lambda: outside(torch.sparse_coo), MATRIX), NO_MATRIX),
    "csr_outside": (put(lambda: outside(torch.sparse_csr), MATRIX), NO_MATRIX),
    "quantized": (put(quantized, MATRIX), NO_MATRIX),
    "nested": (put(nested, MATRIX), NO_MATRIX),
    "meta": (put(torch.zeros(16, 32, device="meta"), MATRIX), NO_MATRIX),
    "without_storage": (put(lambda: without_storage(16, 32), MATRIX), NO_MATRIX),
    "a_number": (put(0.5, MATRIX), NO_MATRIX),
    "endless": (put(endless, MATRIX), NO_MATRIX),
    "vector_for_embedding": (put(torch.zeros(5), EMBEDDING), "embed_tokens|no MiniMind weights"),
    "number_for_embedding": (put(torch.tensor(1.0), EMBEDDING), "embed_tokens|no MiniMind weights"),
    "huge_embedding": (put(torch.zeros(1).expand(FAR), EMBEDDING), "without its|embed_tokens"),
    "norm_of_no_dimension": (put(torch.tensor(1.0), NORM), "q_norm|no MiniMind weights"),
    "norm_of_nothing": (put(torch.zeros(0), NORM), "q_norm|no MiniMind weights"),
    "missing": (without(MATRIX), f"{MATRIX} is missing|lacks '{MATRIX}'"),
    "number_as_name": (put(torch.zeros(1), 7), "names"),
    "nothing_as_name": (put(torch.zeros(1), None), "names"),
    "layer_without_number": (put(torch.zeros(1), ".layers."), "layers"),
    "name_with_a_line_break": (put(torch.zeros(1), "a\nerror: b"), "names"),
    "name_with_colours": (put(torch.zeros(1), "\x1b[31m"), "names"),
    "name_without_end": (put(torch.zeros(1), LONG), "names"),
    "not_plain": (put({}, "model"), "state dict"),
    "a_list": (lambda weights: [1, 2], "state dict"),
    "a_tensor": (lambda weights: torch.zeros(3), "state dict"),
    "empty": (lambda weights: {}, f"{EMBEDDING} is missing|lacks '{EMBEDDING}'"),
}


@pytest.mark.parametrize("case", mark_slow_except_every(3, WEIGHTS))
def test_crafted_weights_are_refused(folder: Path, case: str) -> None:
    change, expected = WEIGHTS[case]
    weights = weights_of(folder)
    content = change(weights)
    path = put_weights(folder, weights if content is None else content)
    for error in refused_weights(folder, apart=True):
        assert str(path) in error and re.search(expected, error), error
        assert len(error) < 1200 + 3 * len(str(path))


DESCRIPTIONS = {
    "hidden_size": 10**9,
    "num_hidden_layers": 10**5,
    "vocab_size": -5,
    "num_attention_heads": "x",
    "num_key_value_heads": 0,
    "max_position_embeddings": 10**12,
    "intermediate_size": 2 * 10**7,
    "rms_norm_eps": None,
    "bos_token_id": [],
    "pad_token_id": 10**22,
    "num_experts_per_tok": 0,
    "hidden_act": "odd",
    "dropout": -1,
    "initializer_range": -1,
}


@pytest.mark.parametrize("name", mark_slow_except_every(3, DESCRIPTIONS))
def test_a_description_that_does_not_fit_its_weights_is_refused(folder: Path, name: str) -> None:
    """Before a model of that size is built."""
    path = folder / "out" / f"{NAME}.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["config"] |= {name: DESCRIPTIONS[name]} | {"head_dim": 8}
    path.write_text(json.dumps(described), encoding="utf-8")
    words = ["--save_dir", str(folder / "out"), "--device", "cpu", "--prompt", "a"]
    assert NAME in error_of(*here(words, program=eval_llm))


def test_what_a_description_holds_besides_sizes_is_ignored(folder: Path) -> None:
    path = folder / "out" / f"{NAME}.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    own = weights.read_config(path.with_suffix(".pth"), {})
    assert (own.hidden_size, own.num_hidden_layers, own.head_dim) == (32, 2, 8)
    described["config"] |= {"to_dict": 3, "num_labels": 10**8, "kwargs": {"a": 1}}
    path.write_text(json.dumps(described), encoding="utf-8")
    assert weights.read_config(path.with_suffix(".pth"), {}).to_diff_dict() == own.to_diff_dict()


def test_weights_of_another_model_are_refused_with_the_first_five_differences(folder: Path) -> None:
    own = weights_of(folder)
    names = [name for name in own if ".layers.1." in name]
    assert len(names) == 11
    renamed = {name.replace(".layers.1.", ".other."): value for name, value in own.items()}
    misshapen = {name: value[:1] if ".layers.1." in name else value for name, value in own.items()}
    shapes = {name: (1, *own[name].shape[1:]) for name in names}
    for content, expected in (
        (
            {name: value for name, value in own.items() if name not in names},
            [f"{name} is missing" for name in names[:5]],
        ),
        (
            own | {name: value for name, value in renamed.items() if ".other." in name},
            [name.replace(".layers.1.", ".other.") + " is not in this model" for name in names[:5]],
        ),
        (
            misshapen,
            [f"{name} is {shapes[name]}, not {tuple(own[name].shape)}" for name in names[:5]],
        ),
    ):
        put_weights(folder, content)
        words = tiny_flags(folder, epochs=1, save_weight="new", from_weight="odd")
        assert f"{'; '.join(expected)} and 6 more. " in error_of(*here(words))


# -------------------------------------------------------------------------------- mutations

EDGES = (0, 1, 2, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
# Of a local header, a directory entry, and the three records at the end: (offset, bytes) of each
# number but the versions.
FIELDS = {
    b"PK\3\4": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\1\2": (
        (8, 2),
        (10, 2),
        (16, 4),
        (20, 4),
        (24, 4),
        (28, 2),
        (30, 2),
        (32, 2),
        (34, 2),
        (38, 4),
        (42, 4),
    ),
    b"PK\6\6": ((4, 8), (16, 4), (20, 4), (24, 8), (32, 8), (40, 8), (48, 8)),
    b"PK\6\7": ((4, 4), (8, 8), (16, 4)),
    b"PK\5\6": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}
IMPORTS = (
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_qtensor",
    "torch Tensor",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_nested_tensor",
    "torch Size",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
    "torch ComplexDoubleStorage",
    "torch QInt8Storage",
    "torch LongStorage",
    "torch BoolStorage",
    "torch HalfStorage",
    "torch.cuda FloatStorage",
    "collections Counter",
    "builtins bytearray",
    "__builtin__ set",
    "_codecs encode",
    "posix system",
    "os mkdir",
    "builtins eval",
)


def flipped(data: bytes, draw: random.Random, start: int = 0) -> bytes:
    """One to eight bytes, from ``start`` on, replaced by others of the file, or by odd ones."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(start, len(data))] = draw.choice((*draw.sample(data, 3), *EDGES[:5]))
    return bytes(changed)


def with_other_numbers(data: bytes, draw: random.Random) -> bytes:
    """Lengths, offsets, methods of the zip file's own records."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        mark, fields = draw.choice(list(FIELDS.items()))
        places = [match.start() for match in re.finditer(re.escape(mark), data)]
        offset, size = draw.choice(fields)
        place = draw.choice(places) + offset
        value = draw.choice((*EDGES, len(data), draw.randrange(len(data))))
        if draw.random() < 0.5:
            value = int.from_bytes(data[place : place + size], "little") + draw.choice((-1, 1, 64))
        changed[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(changed)


def with_other_entries(data: bytes, draw: random.Random) -> bytes:
    """Entries that are swapped, doubled, emptied, cut, lengthened, renamed or left out."""
    entries = entries_of(data)
    for _ in range(draw.randint(1, 3)):
        one, other = draw.choices(list(entries), k=2)
        short = entries[one][: draw.randrange(len(entries[one]) + 1)]
        entries |= draw.choice(
            (
                {one: entries[other], other: entries[one]},
                {one: entries[other]},
                {one: b""},
                {one: short},
                {one: entries[one] + draw.randbytes(64)},
                {one + "x": entries[one]},
                {one.upper(): entries[one]},
                {"../" + one: entries[one]},
                {"byteorder": b"big"},
                {".storage_alignment": b"1"},
                {"version": b"99"},
                {"constants.pkl": b"x"},
            )
        )
        if draw.random() < 0.1 and len(entries) > 1:
            del entries[one]
    return archive(entries, draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def with_other_steps(data: bytes, draw: random.Random, marker: str) -> bytes:
    """Steps of the pickle that are doubled, left out, swapped, or do another thing."""
    entries = entries_of(data)
    pickled = entries["data.pkl"]
    places = [place for _, _, place in pickletools.genops(pickled)] + [len(pickled)]
    steps = [pickled[a:b] for a, b in itertools.pairwise(places)]
    name = str(marker).encode()
    payload = b"cposix\nmkdir\n(X" + struct.pack("<I", len(name)) + name + b"tR"
    numbers = [number for number, step in enumerate(steps) if step[:1] in b"KMJ\x8a"]
    imports = [number for number, step in enumerate(steps) if step[:1] == b"c"]
    for _ in range(draw.randint(1, 4)):
        at, other = draw.randrange(len(steps)), draw.randrange(len(steps))
        how = draw.randrange(8)
        if how == 0:
            steps[at] *= draw.choice((2, 3, 100))
        elif how == 1:
            steps[at] = b""
        elif how == 2:
            steps[at], steps[other] = steps[other], steps[at]
        elif how == 3:
            steps[at] = steps[other]
        elif how == 4:
            value = draw.choice((*EDGES, -1, -(2**31), -(2**63)))
            long = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            steps[draw.choice(numbers)] = b"\x8a" + bytes([len(long)]) + long
        elif how == 5:
            steps[draw.choice(imports)] = f"c{draw.choice(IMPORTS)}\n".replace(" ", "\n").encode()
        elif how == 6:
            steps[at] += draw.choice((payload, b"}", b"]", b"(", b"t", b"R", b"b", b"N", b"\x81"))
        else:
            steps[at] = draw.randbytes(1) + steps[at][1:]
    return archive(entries | {"data.pkl": b"".join(steps)})


def mutated_weights(data: bytes, draw: random.Random, marker: str) -> bytes:
    """A valid file of weights with a few changes where they matter."""
    kind = draw.randrange(10)
    if kind == 0:
        return flipped(data, draw)
    if kind == 1:
        return flipped(data, draw, data.index(b"PK\1\2"))  # the directory
    if kind == 2:
        entries = entries_of(data)
        return archive(entries | {"data.pkl": flipped(entries["data.pkl"], draw)})
    if kind == 3:
        return data[: draw.randrange(len(data))] + draw.randbytes(draw.choice((0, 0, 22, 98)))
    if kind <= 5:
        return with_other_numbers(data, draw)
    if kind == 6:
        return with_other_entries(data, draw)
    return with_other_steps(data, draw, marker)


ODD = (0, -1, 2**31, 2**40, 2**63, 2**64, 10**30, 0.5, 1e400, True, None, "", "x", [], [[]], {})


def places_in(part: object) -> Iterator[tuple[dict | list, object]]:
    """Every place in nested dicts and lists: where, and under which name or number."""
    if isinstance(part, dict | list):
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            yield part, key
            yield from places_in(part[key])


def with_other_values(part: dict, draw: random.Random) -> dict:
    """Values of some JSON that are replaced, swapped, removed or renamed."""
    for _ in range(draw.randint(1, 3)):
        places = list(places_in(part))
        if not places:
            break
        (where, key), (other, key_2) = draw.choices(places, k=2)
        kind = draw.randrange(4)
        if kind == 0:
            where[key] = copy.deepcopy(draw.choice(ODD))
        elif kind == 1:
            where[key] = copy.deepcopy(other[key_2])
        elif kind == 2:
            del where[key]
        elif isinstance(where, dict):
            where[draw.choice(("", "7", "$tensor", "__metadata__", "\n", "x" * 999))] = where[key]
    return part


def mutated_state(data: bytes, draw: random.Random, marker: str) -> bytes:
    """A valid state with a few changes in its bytes, its header, its JSON or its length."""
    size = 8 + int.from_bytes(data[:8], "little")
    header, place = json.loads(data[8:size]), draw.randrange(8)
    begin, end = header["json"]["data_offsets"]
    text = data[size + begin : size + end]
    if place == 0:
        return flipped(data, draw)
    if place == 1:
        return data[: draw.randrange(len(data))] + draw.randbytes(draw.choice((0, 0, 8, 64)))
    if place == 2:
        return flipped(data[:size], draw) + data[size:]
    if place == 3:
        return by_hand(with_other_values(header, draw), data[size:])
    if place == 4:
        text = flipped(text, draw)
    else:
        text = json.dumps(with_other_values(json.loads(text), draw)).encode()
    header["json"] = {"dtype": "U8", "shape": [len(text)]}
    header["json"]["data_offsets"] = [begin, begin + len(text)]
    return by_hand(header, data[size : size + begin] + text)


def open_mutations(
    data: bytes, ending: str, seed: int, numbers: range, seconds: float, folder: str
) -> None:
    """Open one mutation after the other; tell of the one under way, and of the number opened.

    In a process of its own, with little memory."""
    resource.setrlimit(resource.RLIMIT_AS, (4096 * MIB, 4096 * MIB))
    until, opened, marker = time.monotonic() + seconds, 0, f"{folder}/ran"
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    mutated = mutated_weights if ending == "pth" else mutated_state
    for number in numbers:
        if time.monotonic() > until:
            break
        os.pwrite(log, f"{number:9} {opened:9}".encode(), 0)
        changed = mutated(data, random.Random(f"{seed} {number}"), marker)
        path = Path(folder) / f"x_resume_00000001_{digest(changed)}.{ending}"
        path.write_bytes(changed)
        try:
            with warnings.catch_warnings(record=True) as warned:
                content = opener(path)(path)
            opened += 1
            state_bytes(content)  # all of it can be read, and saved again
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
        finally:
            path.unlink()
        assert not warned, [str(warning.message) for warning in warned]
        assert not os.path.exists(marker), "code of a file ran"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert grown < 1024 * 1024, f"{grown} KiB in memory"
    os.pwrite(log, f"{number:9} {opened:9}".encode(), 0)


def miniature(part: object, most: int = 99) -> object:
    """A state or weights, with the first few of what each part holds, and of a tensor's numbers."""
    if isinstance(part, Tensor):
        return part.flatten()[:3].clone()
    if isinstance(part, dict):
        return {name: miniature(value, 4) for name, value in list(part.items())[:most]}
    return [miniature(value, 4) for value in part[:4]] if isinstance(part, list) else part


@pytest.fixture(params=["safetensors", "pth"])
def fuzz(
    request: pytest.FixtureRequest, trained: Path, tmp_path: Path
) -> Callable[[int, range, float], tuple[int, float]]:
    """Opens mutations of a state, or of weights; nothing but CheckpointError may come of it."""
    data = {
        "safetensors": lambda: state_bytes(miniature(midway(trained))),
        "pth": lambda: to_bytes(miniature(weights_of(trained))),
    }[request.param]()

    def opened(seed: int, numbers: range, seconds: float) -> tuple[int, float]:
        """Returns: how many mutations there were, and which share still could be opened."""
        status = in_a_process(
            open_mutations,
            data,
            request.param,
            seed,
            numbers,
            seconds,
            str(tmp_path),
            timeout=seconds + 60,
        )
        last, opened = map(int, (tmp_path / "log").read_text().split())
        assert status == 0, f"seed {seed}, mutation {last}: exit status {status}, see above"
        num = last - numbers.start + 1
        return num, opened / num

    return opened


def test_mutated_files_are_opened_or_refused(fuzz: Callable) -> None:
    num, share = fuzz(1, range(NUM_MUTATIONS), 60)
    assert num == NUM_MUTATIONS and 0.05 < share < 0.6


@pytest.mark.slow
def test_mutated_files_are_opened_or_refused_for_minutes(fuzz: Callable) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    num, share = fuzz(seed, range(10**8), FUZZ_SECONDS)
    print(f"{num} mutations of seed {seed}, {share:.0%} could still be opened")
    assert num > 1000 and 0.05 < share < 0.6
