"""Files that a kill, a full disk or a flipped bit cannot turn into a wrong run.

A state is one file, ``<name>_resume_<update>_<digest>.pth``. The digest in its name is that of its
bytes, so one rename commits it, and a file counts only if its bytes are what was written.
"""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import pickletools
import random
import re
import shutil
import struct
import uuid
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import BinaryIO

import torch
from torch import Tensor

from model.model_minimind import MiniMindConfig
from trainer.errors import CheckpointError, shown

FORMAT = 2  # of the state; raise it when a field changes its meaning
KEPT_STATES = 2  # the newest and the one before
# What tensors in dicts and lists need. torch would let a file call more: byte arrays and tensors of
# any size, sparse ones whose indices point anywhere, text encoders.
NEEDED = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|"
    r"torch (Float|Half|BFloat16|Double|Byte|Char|Short|Int|Long|Bool)Storage"
)
# How torch.save ends its zip files, of whatever size: the directory's length and place, twice.
ZIP_END = struct.Struct("<4s36x2Q 4s4xQ4x 4s16xH")


def checkpoint_name(weight: str, config: MiniMindConfig) -> str:
    """MiniMind's name for a model's files: ``pretrain_768``, ``pretrain_768_moe``."""
    return f"{weight}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


class HashedFile:
    """A new file for torch.save to write to: digests what passes, keeps the reason of a failure."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None  # torch.save raises another one that hides it

    def write(self, data: bytes) -> int:
        """All of ``data``, or OSError."""
        left = whole = memoryview(data).cast("B")
        self.sha256.update(whole)
        try:
            while left:
                left = left[os.write(self.descriptor, left) :]
        except OSError as error:
            self.error = error
            raise
        return len(whole)

    def flush(self) -> None:
        """Nothing is held back; torch.save asks for it."""


def short(digest: "hashlib._Hash") -> str:
    """The 32 hexadecimal digits by which a state's name tells its content."""
    return digest.hexdigest()[:32]


def digest(data: bytes | memoryview) -> str:
    """32 hexadecimal digits of SHA-256."""
    return short(hashlib.sha256(data))


def digest_of_file(path: Path) -> str:
    """The digest of a file's bytes, without holding them."""
    with path.open("rb") as file:
        return short(hashlib.file_digest(file, "sha256"))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, or needs no sync
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """The folder, and those above it, if they are missing; no power loss takes them again."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def write_atomically(path: Path, content: bytes | memoryview | dict) -> Path:
    """The file holds either what it held before or all of ``content``, even after a power loss.

    Args:
        path: a ``*`` in its name becomes the digest of the bytes.
        content: bytes as they are; a dict as torch.save writes it.
    Returns: the path.
    Raises: OSError, with nothing left behind, if the disk is full or read-only."""
    part = path.with_name(f".{path.stem.rstrip('*')}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    file = HashedFile(part)
    try:
        try:
            if isinstance(content, dict):
                torch.save(content, file)
            else:
                file.write(content)
            os.fsync(file.descriptor)  # the bytes first, then the name
        except RuntimeError as error:
            raise file.error or error from None
        finally:
            os.close(file.descriptor)
        path = path.with_name(path.name.replace("*", short(file.sha256)))
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the reason matters, not what cleaning up met
            os.unlink(part)
        raise
    sync_folder(path.parent)
    return path


def to_bytes(content: dict) -> memoryview:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def update_of(state: str | Path) -> int:
    """The update after which a state was saved, from its name."""
    return int(Path(state).stem.rsplit("_", 2)[1])


def list_states(folder: str | Path, name: str) -> list[Path]:
    """A run's states, newest first: by update, since clocks can go back."""
    pattern = re.compile(re.escape(name) + r"_resume_\d{8,}_[0-9a-f]{32}\.pth")
    found = [path for path in Path(folder).glob("*.pth") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: (update_of(path), path.name), reverse=True)


def remove_partial_files(folder: str | Path, name: str) -> list[Path]:
    """Delete, and return, what a killed process of this run left half-written."""
    pattern = re.compile(rf"\.{re.escape(name)}(_resume_\d+_|_metrics|)\.\d+-[0-9a-f]{{8}}\.part")
    parts = [path for path in Path(folder).glob(".*.part") if pattern.fullmatch(path.name)]
    for part in parts:
        part.unlink(missing_ok=True)
    return parts


def tensors_in(content: object) -> Iterator[Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(part)


def make_room(states: list[Path]) -> None:
    """Remove all states but the newest good one: what a fallback is needs its bytes looked at."""
    with contextlib.suppress(OSError):  # the save that lacks room says so
        good = next((path for path in states if digest_of_file(path) in path.name), None)
        for path in states:
            if good not in (None, path):
                path.unlink(missing_ok=True)


def save_state(
    folder: str | Path, name: str, update: int, state: dict, keep: int = KEPT_STATES
) -> Path:
    """Write a state, then remove all but it and the newest before it.

    A state of a later update is of a branch that the run went back from; it goes too.

    A failed write is tried once more, under a new name: after a failed sync, another sync of the
    same file may succeed although the bytes are lost. On a full disk one old state makes room.

    Raises: OSError that tells the space needed; the newest state before is intact."""
    folder = Path(folder)
    make_folder(folder)
    path, content = folder / f"{name}_resume_{update:08d}_*.pth", state | {"format": FORMAT}
    before = list_states(folder, name)
    try:
        path = write_atomically(path, content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            make_room(before)
        try:
            path = write_atomically(path, content)
        except OSError as again:
            needed = sum(tensor.nbytes for tensor in tensors_in(content)) / 1e6
            free = shutil.disk_usage(folder).free / 1e6
            newest = next(iter(list_states(folder, name)), None)
            raise OSError(
                f"{again.strerror} while saving update {update:,} in {folder}: {needed:,.1f} MB "
                f"needed, {free:,.1f} MB free; the newest state there is {newest and newest.name}"
            ) from again
    kept = [old for old in before if update_of(old) < update][: keep - 1]
    removed = [old for old in before if old != path and old not in kept]
    for old in removed:
        old.unlink(missing_ok=True)
    if removed:  # else a power loss could bring back a branch that the run went back from
        sync_folder(folder)
    return path


def load_tensors(source: io.BytesIO | Path, path: Path) -> dict:
    """What torch.save wrote, on the CPU, without running code. Raises: CheckpointError."""
    try:
        with source.open("rb") if isinstance(source, Path) else source as file:
            num_steps = check_archive(file)
            with warnings.catch_warnings(record=True, action="always") as warned:
                content = torch.load(file, map_location="cpu", weights_only=True)
        if warned:  # of nothing that torch.save writes
            raise ValueError(warned[0].message)
        check_plain(content, num_steps)
        return content
    except (zipfile.BadZipFile, struct.error):
        reason = "it is not what torch.save writes, or cut short"
    except pickle.UnpicklingError:  # torch's own words advise to run the code
        reason = "damaged"
    except Exception as error:  # a hostile file can raise anything in there
        reason = (str(error).splitlines() or ["damaged"])[0]
    raise CheckpointError(f"{path} cannot be loaded: {shown(reason):.160}.")


def check_archive(file: BinaryIO) -> int:
    """A zip file as torch.save writes it, whose content asks for nothing but tensors.

    With one directory, at its end, by which every reader finds the same entries; and nothing packed
    in them: a few bytes could unpack to any size.

    Returns: the number of steps that build the content. Raises: ValueError, BadZipFile."""
    start, size = file.read(4), file.seek(0, io.SEEK_END)
    end = file.seek(max(size - ZIP_END.size, 0))
    mark, length, place, second, second_place, third, comment = ZIP_END.unpack(file.read())
    marks = start, mark, second, third, comment
    if marks != (b"PK\3\4", b"PK\6\6", b"PK\6\7", b"PK\5\6", 0) or not (
        place + length == second_place == end
    ):
        raise zipfile.BadZipFile
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("torch.save does not compress")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries overlap")
        pickled = [e for e in entries if e.filename.lower().endswith("data.pkl")]
        if len(pickled) != 1:
            raise ValueError(f"it has {len(pickled)} entries data.pkl")
        steps = pickletools.genops(archive.read(pickled[0]))
    num_steps = 0
    for opcode, argument, _ in steps:
        if opcode.name == "GLOBAL" and not NEEDED.fullmatch(argument):
            wanted = argument.replace(" ", ".")
            raise ValueError(f"it asks to import {wanted}, and tensors need no code")
        num_steps += 1
    file.seek(0)
    return num_steps


def check_plain(content: object, most: int) -> None:
    """Only dicts, lists, text, numbers, and tensors that are as large as they say.

    Args: most: so many parts at most: a list may hold itself, or another one twice, and so on.
    Raises: ValueError."""
    waiting, num = [content], 0
    while waiting:
        part, num = waiting.pop(), num + 1
        if num + len(waiting) > most:
            raise ValueError("its parts hold each other")
        if isinstance(part, dict):
            if isinstance(part, OrderedDict):
                vars(part).clear()  # an attribute from a file would hide a method
            waiting += dict.values(part)
            if not all(isinstance(k, int) or is_name(k) for k in dict.keys(part)):
                raise ValueError("one of its names is no line of text")
        elif isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, Tensor):
            if part.numel() * part.element_size() > part.untyped_storage().nbytes():
                raise ValueError(f"it holds a tensor {tuple(part.shape)} without its numbers")
        elif isinstance(part, str):
            part.encode()  # half of a surrogate pair could not be written anywhere
        elif isinstance(part, int):
            part.to_bytes(8, signed=True)
        elif not isinstance(part, float | None):
            raise ValueError(f"it holds a {type(part).__name__}")


def is_name(key: object) -> bool:
    """Whether a message can name it."""
    return isinstance(key, str) and key.isprintable() and len(key) <= 200


def read_state(path: Path) -> dict:
    """A state whose bytes are those that were written. Raises: CheckpointError if they are not."""
    data = path.read_bytes()
    if path.stem.rsplit("_", 1)[1] != digest(data):
        raise CheckpointError(f"{path} is damaged: its {len(data):,} bytes are not those written.")
    state = load_tensors(io.BytesIO(data), path)
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT:
        found = repr(found) if isinstance(found, int | float | str | None) else type(found).__name__
        raise CheckpointError(
            f"{path} has format {found:.20}; this trainer reads format {FORMAT}."
        )
    return state


def newest_state(
    folder: str | Path, name: str, update: int | None = None
) -> tuple[dict | None, list[str]]:
    """The newest good state, or None if there are none, and a line on each damaged one passed over.

    Args: update: the state of this update instead, and no other.
    Raises: CheckpointError if there are states and none is good: never a silent fresh start."""
    states, complaints = list_states(folder, name), []
    wanted = [path for path in states if update in (None, update_of(path))]
    for path in wanted:
        try:
            return read_state(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if update is not None:
        kept = ", ".join(f"{update_of(path):,}" for path in states) or "none"
        raise CheckpointError(
            f"--resume_step {update}: no good state of that update in {folder}; there are: {kept}. "
            + " ".join(complaints)
        )
    if states:
        raise CheckpointError(
            f"no state of {name} can be used: {' '.join(complaints)} "
            f"Restore one, or start afresh with --from_resume 0 --overwrite 1."
        )
    return None, complaints


def check_fits(found: object, expected: object, where: str) -> None:
    """A part of a state has the names, shapes and types of this run's own part.

    Nothing is copied before: a crafted shape could make a fused kernel write past its memory, and
    so could a tensor that says one number many times over.

    Args: expected: an example; or a type; or a dict or list with the example of all that is in it,
    ``{str: float}``, ``[int]``.
    Raises: CheckpointError naming the first difference."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or not is_plain(found):
            raise CheckpointError(f"the state does not fit: {where} is no plain tensor.")
        given, own = (f"{tuple(t.shape)} {t.dtype}" for t in (found, expected))
        if given != own:
            raise CheckpointError(f"the state does not fit: {where} is {given}, expected {own}.")
        if not torch.isfinite(found).all():
            raise CheckpointError(f"the state does not fit: {where} is not finite.")
    elif isinstance(expected, type | UnionType):
        if not isinstance(found, expected):
            own = getattr(expected, "__name__", expected)
            given = type(found).__name__
            raise CheckpointError(f"the state does not fit: {where} is a {given}, expected {own}.")
    elif not isinstance(found, type(expected)) or isinstance(found, bool):
        given, own = type(found).__name__, type(expected).__name__
        raise CheckpointError(f"the state does not fit: {where} is a {given}, expected {own}.")
    elif isinstance(expected, list):
        for number, part in enumerate(found):
            check_fits(part, expected[0], f"{where}[{number}]")
    elif isinstance(expected, dict) and isinstance(next(iter(expected), None), type):
        [(key_type, example)] = expected.items()
        for key, part in found.items():
            check_fits(key, key_type, f"a name in {where}")
            check_fits(part, example, f"{where}.{key}")
    elif isinstance(expected, dict):
        missing = [str(key) for key in expected if key not in found][:5]
        unexpected = [str(key) for key in found if key not in expected][:5]
        if missing or unexpected:
            raise CheckpointError(
                f"the state does not fit: {where} lacks {', '.join(missing) or 'nothing'}, and has "
                f"{', '.join(unexpected) or 'nothing'} that this model has not."
            )
        for key in expected:
            check_fits(found[key], expected[key], f"{where}.{key}")


def is_plain(tensor: Tensor) -> bool:
    """Whether each number is in memory once, and in order."""
    special = tensor.is_quantized or tensor.is_meta or tensor.requires_grad
    return tensor.layout == torch.strided and tensor.is_contiguous() and not special


def rng_state() -> dict:
    """The state of every random generator of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict) -> None:
    """Undo everything drawn since ``rng_state``. Raises: CheckpointError if it is none."""
    try:
        random.setstate(state["python"])
        if not isinstance(state["python"][2], float | None):  # a number kept for the next draw
            raise ValueError("what Python's keeps is no number")
        torch.set_rng_state(state["torch"])
        words_left = state["torch"][8:12].view(torch.int32).item()  # of 624
        next_word = state["torch"][16:24].view(torch.int64).item()
        if not 0 <= next_word <= 625 - words_left:  # torch looks at each alone, and reads on
            raise ValueError("torch's has no word at its place")
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = shown(str(error).split("\n")[0])
        raise CheckpointError(f"the state's random generators cannot be used: {reason}") from None
