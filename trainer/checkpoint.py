"""Files that a kill, a full disk or a flipped bit cannot turn into a wrong run.

A state is one file, ``<name>_resume_<update>_<digest>.safetensors``. The digest in its name is that
of its bytes, so one rename commits it, and a file counts only if its bytes are what was written.
"""

import contextlib
import errno
import hashlib
import os
import random
import re
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from model.model_minimind import MiniMindConfig
from trainer import distributed
from trainer.console import log
from trainer.errors import CheckpointError, printable
from trainer.host import sync_folder
from trainer.reading import hash_of, open_regular, short
from trainer.state import num_bytes, parse_state, size_by_header, write_state

FORMAT = 3  # of the state; raise it when a field changes its meaning
FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
KEPT_STATES = 2  # the newest and the one before


def checkpoint_name(weight: str, config: MiniMindConfig) -> str:
    """MiniMind's name for a model's files: ``pretrain_768``, ``pretrain_768_moe``."""
    return f"{weight}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


class HashedFile:
    """A new file that hashes what is written to it, and keeps the reason of a failure."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, FLAGS, 0o666)
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None  # torch.save raises another one that hides it

    def write(self, data: bytes | memoryview) -> int:
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


def make_folder(folder: Path) -> None:
    """The folder, and those above it, if they are missing; no power loss takes them again."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def write_atomically(path: Path, content: bytes | Callable[[HashedFile], object]) -> Path:
    """The file holds either what it held before or all of ``content``, even after a power loss.

    Args:
        path: a ``*`` in its name becomes the digest of the bytes.
        content: the bytes, or a function that writes them to the file it is given.
    Returns: the path.
    Raises: OSError, with nothing left behind, if the disk is full or read-only."""
    part = path.with_name(f".{path.stem.rstrip('*')}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    file = HashedFile(part)
    try:
        try:
            if callable(content):
                content(file)
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


def update_of(state: str | Path) -> int:
    """The update after which a state was saved, from its name."""
    return int(Path(state).stem.rsplit("_", 2)[1])


def is_state(file: str, name: str | None = None) -> bool:
    """Whether a file has the name of a state, of this run or of any."""
    run = ".+" if name is None else re.escape(name)
    return bool(re.fullmatch(rf"{run}_resume_\d{{8,}}_[0-9a-f]{{32}}\.(safetensors|pth)", file))


def list_states(folder: str | Path, name: str) -> list[Path]:
    """A run's states, newest first: by update, since clocks can go back."""
    found = [path for path in Path(folder).glob("*_resume_*") if is_state(path.name, name)]
    return sorted(found, key=lambda path: (update_of(path), path.name), reverse=True)


def remove_partial_files(folder: str | Path, name: str) -> list[Path]:
    """Delete, and return, what a killed process of this run left half-written."""
    pattern = re.compile(rf"\.{re.escape(name)}(_resume_\d+_|_metrics|)\.\d+-[0-9a-f]{{8}}\.part")
    parts = [path for path in Path(folder).glob(".*.part") if pattern.fullmatch(path.name)]
    for part in parts:
        part.unlink(missing_ok=True)
    return parts


def remove(path: Path) -> None:
    """Delete a file; a folder of that name, which nobody wrote here, stays. Raises: OSError."""
    with contextlib.suppress(IsADirectoryError):
        path.unlink(missing_ok=True)


def is_good(path: Path) -> bool:
    """Whether a state can be read and its bytes are those that were written."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        return is_whole(file, path)
    return False


def is_whole(file: BinaryIO, path: Path) -> bool:
    """As ``is_good``, of an open one. Its size tells first: it could be of terabytes."""
    size = file.seek(0, os.SEEK_END)
    return size == size_by_header(file) and hash_of(file) == path.stem.rsplit("_", 1)[1]


def make_room(states: list[Path]) -> None:
    """Remove all states except the newest good one."""
    with contextlib.suppress(OSError):  # the save that lacks room says so
        good = next(filter(is_good, states), None)
        for path in states:
            if good not in (None, path):
                remove(path)


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
    path = folder / f"{name}_resume_{update:08d}_*.safetensors"
    content = partial(write_state, state | {"format": FORMAT})
    before = list_states(folder, name)
    try:
        path = write_atomically(path, content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            make_room(before)
        try:
            path = write_atomically(path, content)
        except OSError as again:
            needed = num_bytes(state) / 1e6
            free = shutil.disk_usage(folder).free / 1e6
            newest = next(iter(list_states(folder, name)), None)
            raise OSError(
                f"{again.strerror} while saving update {update:,} in {folder}: {needed:,.1f} MB "
                f"needed, {free:,.1f} MB free; the newest state there is {newest and newest.name}"
            ) from again
    kept = [old for old in before if update_of(old) < update][: keep - 1]
    removed = [old for old in before if old != path and old not in kept]
    for same_update in (True, False):  # one that could pass for this state goes first, for sure
        group = [old for old in removed if (update_of(old) == update) is same_update]
        for old in group:
            remove(old)
        if group:  # else a power loss could bring back a branch that the run went back from
            sync_folder(folder)
    return path


def read_state(path: Path) -> dict:
    """A state whose bytes are those that were written. Raises: CheckpointError if they are not.

    They are hashed before they are held."""
    if path.suffix == ".pth":
        raise CheckpointError(f"{path} has format 2 or older; this trainer reads format {FORMAT}.")
    try:
        with open_regular(path) as file:
            if not is_whole(file, path):
                size = f"{file.seek(0, os.SEEK_END):,} bytes"
                raise CheckpointError(f"{path} is damaged: its {size} are not those written.")
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        state = parse_state(data)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be loaded: {printable(error):.160}.") from None
    found = state.get("format")
    if type(found) is not int or found != FORMAT:
        found = repr(found) if isinstance(found, int | float | str | None) else type(found).__name__
        raise CheckpointError(f"{path} has format {found:.20}; this trainer reads format {FORMAT}.")
    return state


def newest_state(
    folder: str | Path, name: str, update: int | None = None, check: Callable[[dict], object] = bool
) -> tuple[dict | None, list[str]]:
    """The newest good state, or None if there are none, and a line on each damaged one passed over.

    Args:
        update: the state of this update instead, and no other.
        check: raises CheckpointError if a state is not what one should be.
    Raises: CheckpointError if there are states and none is good: never a silent fresh start."""
    states, complaints = list_states(folder, name), []
    wanted = [path for path in states if update in (None, update_of(path))]
    for path in wanted:
        try:
            state = read_state(path)
            check(state)
            return state, complaints
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


def save_for_all(
    folder: str | Path, name: str, update: int, parts: dict, keep: int = KEPT_STATES
) -> Path:
    """Save all that the next update needs. Every rank calls it, between updates; rank 0 writes.

    Args: parts: what to save; of an object that has one, its ``state_dict``.
    Returns: the state's path. Raises: as ``save_state``."""
    state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
    state["rng"] = distributed.gather(rng_state())
    return distributed.on_main_process(partial(save_state, folder, name, update, state, keep))


def newest_for_all(folder: str | Path, name: str, *choice: Any) -> dict | None:
    """The newest good state, as rank 0 reads it, on every rank. Args, raises: see newest_state."""
    found, complaints = distributed.on_main_process(partial(newest_state, folder, name, *choice))
    for complaint in complaints:
        log(f"warning: {complaint} Using the state before it.")
    return found


def rng_state() -> dict:
    """The state of every random generator of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict) -> None:
    """Undo everything drawn since ``rng_state``. Raises: CheckpointError if it is none."""
    try:
        version, words, kept = state["python"]
        if not isinstance(kept, float | None):  # the second number of a pair, for the next draw
            raise ValueError("what Python's keeps is no number")
        random.setstate((version, tuple(words), kept))
        torch.set_rng_state(state["torch"])
        words_left = state["torch"][8:12].view(torch.int32).item()  # of 624
        next_word = state["torch"][16:24].view(torch.int64).item()
        if not 0 <= next_word <= 625 - words_left:  # torch looks at each alone, and reads on
            raise ValueError("torch's has no word at its place")
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = printable(str(error).split("\n")[0])
        raise CheckpointError(f"the state's random generators cannot be used: {reason}") from None
