"""Files that a kill, a full disk or a flipped bit cannot turn into a wrong run.

A state is one file, ``<name>_resume_<update>_<digest>.pth``. The digest in its name is that of its
bytes, so one rename commits it, and a file counts only if its bytes are what was written.
"""

import hashlib
import io
import os
import pickle
import random
import re
from pathlib import Path

import torch

from model.model_minimind import MiniMindConfig

FORMAT = 1  # of the state; raise it when a field changes its meaning
KEPT_STATES = 2  # the newest and the one before


class CheckpointError(ValueError):
    """Weights or a state cannot be used, or must not be overwritten; nothing was changed."""

    exit_status = 4


def checkpoint_name(weight: str, config: MiniMindConfig) -> str:
    """MiniMind's name for a model's files: ``pretrain_768``, ``pretrain_768_moe``."""
    return f"{weight}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """The file holds either what it held before or all of ``data``, even after a power loss.

    Raises: OSError, with nothing left behind, if the disk is full or read-only."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the bytes first, then the name
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened, or needs no sync
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_bytes(content: dict) -> memoryview:
    """What torch.save writes. In memory first: on a full disk torch.save hides the reason."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def digest(data: bytes | memoryview) -> str:
    """32 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def list_states(folder: str | Path, name: str) -> list[Path]:
    """A run's states, newest first: by update, since clocks can go back."""
    pattern = re.compile(re.escape(name) + r"_resume_(\d+)_[0-9a-f]{32}\.pth")
    found = [(int(m[1]), p) for p in Path(folder).glob("*.pth") if (m := pattern.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def remove_partial_files(folder: str | Path, name: str) -> None:
    """Delete what a killed save of this run left half-written."""
    for part in Path(folder).glob(f".{name}_resume_*.part"):
        part.unlink(missing_ok=True)


def save_state(folder: str | Path, name: str, update: int, state: dict) -> Path:
    """Write a state, then remove those older than the previous one. Raises: OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial_files(folder, name)
    data = to_bytes(state | {"format": FORMAT})
    path = folder / f"{name}_resume_{update:08d}_{digest(data)}.pth"
    write_atomically(path, data)
    for old in list_states(folder, name)[KEPT_STATES:]:
        old.unlink()
    return path


def load_tensors(source: io.BytesIO | Path, path: Path) -> dict:
    """What torch.save wrote, on the CPU, without running code. Raises: CheckpointError."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to import {wanted[1]}, and tensors need no code" if wanted else "damaged"
    except (RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
    raise CheckpointError(f"{path} cannot be loaded: {reason:.160}.")


def read_state(path: Path) -> dict:
    """A state whose bytes are those that were written. Raises: CheckpointError if they are not."""
    data = path.read_bytes()
    if path.stem.rsplit("_", 1)[1] != digest(data):
        raise CheckpointError(f"{path} is damaged: its {len(data):,} bytes are not those written.")
    state = load_tensors(io.BytesIO(data), path)
    if state.get("format") != FORMAT:
        found = state.get("format")
        raise CheckpointError(f"{path} has format {found}; this trainer reads format {FORMAT}.")
    return state


def newest_state(folder: str | Path, name: str) -> tuple[dict | None, list[str]]:
    """The newest good state, or None if there are none, and a line on each damaged one passed over.

    Raises: CheckpointError if there are states and none is good: never a silent fresh start."""
    states, complaints = list_states(folder, name), []
    for path in states:
        try:
            return read_state(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if states:
        raise CheckpointError(
            f"no state of {name} can be used: {' '.join(complaints)} "
            f"Restore one, or start afresh with --from_resume 0 --overwrite 1."
        )
    return None, complaints


def rng_state() -> dict:
    """The state of every random generator of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict) -> None:
    """Undo everything drawn since ``rng_state``."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
