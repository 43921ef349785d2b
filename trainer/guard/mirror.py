"""Copies of the states in a second place, since a rented disk is often lost with its machine.

A copy gets its final name only after it has been read back and compared, so a broken connection
leaves nothing that looks complete. Failures never affect training or the local states.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
from fsspec import AbstractFileSystem

from trainer.address import scrub
from trainer.checkpoint import HashedFile, is_state, make_folder, update_of, write_atomically
from trainer.errors import CheckpointError, Interrupted
from trainer.reading import short

CHUNK_BYTES = 2**22  # held in memory while a state is copied
PAUSES = (1, 5, 30, 60)  # seconds between attempts; the last one repeats
FAILING_SECONDS = 20  # for the last copy to a failing mirror, since waiting costs money
TIMEOUT_SECONDS = 60  # without an answer, after which an sftp server counts as lost
PART = re.compile(r"\.(.+)\.[0-9a-f]{16}\.part")

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # otherwise it prints tracebacks


class MirrorError(OSError):
    """The mirror cannot be read, although it may hold the state to resume from."""

    exit_status = 6


def reason_of(error: Exception) -> str:
    """The type and the first line of an error, without secrets."""
    lines = scrub(str(error)).splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]:.200}"


@contextlib.contextmanager
def connected(url: str) -> Generator[tuple[AbstractFileSystem, str]]:
    """The file system and folder of a URL, over a new connection: a cached one may be broken."""
    is_ssh = url.startswith(("sftp://", "ssh://"))
    limits = {"timeout": TIMEOUT_SECONDS, "channel_timeout": TIMEOUT_SECONDS} if is_ssh else {}
    fs, folder = fsspec.url_to_fs(url, skip_instance_cache=True, **limits)
    try:
        if is_ssh:
            fs.ftp.get_channel().settimeout(TIMEOUT_SECONDS)
        yield fs, folder.rstrip("/")
    finally:
        for part in ("ftp", "client"):
            with contextlib.suppress(Exception):  # most file systems have neither
                getattr(fs, part).close()


def names_in(fs: AbstractFileSystem, folder: str) -> list[str]:
    """The names of the files in a folder; empty if it does not exist yet.

    Not those of folders, nor of pipes and devices, which would never end."""
    try:
        found = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return []
    return [f["name"].rsplit("/", 1)[-1] for f in found if f["type"] in ("file", "link")]


def open_binary(fs: AbstractFileSystem, path: str, mode: Literal["rb", "wb"]) -> Any:
    """Open a binary file. fsspec annotates the result as text or bytes, whatever the mode."""
    return fs.open(path, mode)


def chunks(fs: AbstractFileSystem, path: str) -> Iterator[bytes]:
    """The content of a file."""
    size = fs.size(path)
    with open_binary(fs, path, "rb") as file:
        for start in range(0, size, CHUNK_BYTES):
            if hasattr(file, "prefetch"):  # paramiko; without it, each 32 KiB is a round trip
                file.prefetch(min(start + CHUNK_BYTES, size))
            yield file.read(CHUNK_BYTES)


def copy(source: BinaryIO, fs: AbstractFileSystem, folder: str, state: str) -> None:
    """Write ``source`` under a temporary name, read it back, then rename it to ``state``."""
    fs.makedirs(folder, exist_ok=True)
    part = f"{folder}/.{state}.{secrets.token_hex(8)}.part"
    try:
        with open_binary(fs, part, "wb") as target:
            if hasattr(target, "set_pipelined"):  # paramiko; does not wait for each write
                target.set_pipelined()
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
            if getattr(fs, "local_file", False):  # else reading back may not reach the disk
                target.flush()
                os.fsync(target.fileno())
        written = hashlib.sha256()
        for chunk in chunks(fs, part):
            written.update(chunk)
        if short(written) not in state:
            raise OSError(f"the {fs.size(part):,} bytes read back are not those saved")
        fs.mv(part, f"{folder}/{state}")
    except Exception:
        with contextlib.suppress(Exception):  # if the connection is broken, the next attempt does
            fs.rm_file(part)
        raise


class Mirror:
    """The place to which a background thread copies the states called ``name``.

    Args:
        url: a folder, or any URL that fsspec supports.
        warn: called with a message when copying fails or works again, from any thread.
        keep: how many states of this run to keep there."""

    def __init__(self, url: str, name: str, warn: Callable[[str], None], keep: int = 2) -> None:
        self.url, self.name, self.warn, self.keep = url, name, warn, keep
        self.safe_url = scrub(url)
        self._own: set[str] = set()  # names of states that may be deleted there
        self._clearing = False  # whether all states may be deleted
        self._warned: set[object] = set()  # kinds of failures since the last successful copy
        self._changed = threading.Condition()  # guards the following attributes
        self._offered: Path | None = None  # the newest state
        self._taken: Path | None = None  # the state that the thread last tried to copy
        self._copied: Path | None = None
        self._ended = False
        # botocore's retries would draw from Python's random number generator.
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def states(self) -> list[str]:
        """The names of the states there, newest first. Raises: MirrorError."""
        return self._read(self._states_in)

    def fetch(self, state: str, folder: Path) -> Path:
        """Copy a state to a local folder. Raises: MirrorError; CheckpointError if it is damaged."""

        def take(fs: AbstractFileSystem, there: str) -> Path:
            size, free = fs.size(f"{there}/{state}"), shutil.disk_usage(folder).free
            where = f"{self.safe_url}/{state}"
            if size > free:
                raise CheckpointError(f"{where} has {size:,} bytes; {free:,} are free in {folder}.")

            def content(file: HashedFile) -> None:
                for chunk in chunks(fs, f"{there}/{state}"):
                    file.write(chunk)
                if short(file.sha256) not in state:
                    raise CheckpointError(
                        f"{where} is damaged: its {size:,} bytes are not those written."
                    )

            return write_atomically(folder / state, content)

        make_folder(folder)
        return self._read(take)

    def add_own(self, names: Iterable[str]) -> None:
        """Mark states as this run's. Only these and the offered ones are ever deleted there."""
        self._own.update(names)

    def clear(self) -> None:
        """Delete all other states once the next one is copied, for a new run of the same name."""
        self._clearing = True

    def offer(self, path: Path) -> None:
        """Copy a state in the background. Of several waiting states, only the newest is copied."""
        with self._changed:
            skipped = self._offered if self._offered != self._taken else None
            self._own.add(path.name)
            self._offered = path
            self._changed.notify_all()
        if skipped:
            self._warn_once(
                "slow",
                f"{self.safe_url} is still busy with an older state; the state of "
                f"update {update_of(skipped.name):,} is skipped",
            )

    def finish(self, seconds: float) -> None:
        """Wait until the newest state is copied, for at most ``seconds``, or less if the mirror is
        failing; then stop copying."""
        since = time.monotonic()
        with self._changed:
            while self._copied != self._offered:
                most = min(seconds, FAILING_SECONDS) if self._warned - {"slow"} else seconds
                if (left := since + most - time.monotonic()) <= 0:
                    break
                self._changed.notify_all()  # ends the pause between attempts
                self._changed.wait(min(left, 1))  # in slices, so that signals are handled
            if (path := self._offered) is not None and path != self._copied:
                self._warn_once(
                    path,
                    f"the state of update {update_of(path.name):,} is not at "
                    f"{self.safe_url}; it is only at {path}",
                )
            self._ended = True
            self._changed.notify_all()

    def _warn_once(self, kind: object, text: str) -> None:
        """Warn, once per kind until a copy succeeds, and not after ``finish``."""
        if kind not in self._warned and not self._ended:
            self._warned.add(kind)
            with contextlib.suppress(Exception):  # a closed console
                self.warn(f"warning: mirror: {text}")

    def _read(self, task: Callable[[AbstractFileSystem, str], Any]) -> Any:
        """The result of ``task``, which gets up to three attempts. Raises: MirrorError."""
        for pause in (*PAUSES[:2], 0):
            try:
                with connected(self.url) as (fs, folder):
                    return task(fs, folder)
            except (Interrupted, CheckpointError):
                raise
            except Exception as error:
                reason = reason_of(error)
            time.sleep(pause)
        raise MirrorError(f"--checkpoint_mirror {self.safe_url} cannot be read: {reason}")

    def _work(self) -> None:
        """The thread: copy the newest state, repeatedly if necessary, then wait for the next."""
        failures = 0
        while True:
            with self._changed:
                if failures and self._offered == self._taken and not self._ended:
                    self._changed.wait(PAUSES[min(failures, len(PAUSES)) - 1])
                self._changed.wait_for(lambda: self._ended or self._offered != self._copied)
                if self._ended or self._offered is None:
                    return
                path = self._taken = self._offered
            failures = 0 if self._attempt(path) else failures + 1

    def _attempt(self, path: Path) -> bool:
        """Copy a state over a new connection. Returns: whether it succeeded."""
        copied = False
        try:
            with path.open("rb") as source, connected(self.url) as (fs, folder):
                for name in names_in(fs, folder):  # left by a broken connection or a kill
                    if (part := PART.fullmatch(name)) and part[1] in self._own:
                        fs.rm_file(f"{folder}/{name}")
                copy(source, fs, folder, path.name)
                copied = True
                self._prune(fs, folder, path.name)
        except Exception as error:
            failed = (
                f"older states at {self.safe_url} were not removed: {reason_of(error)}"
                if copied
                else f"state of update {update_of(path.name):,} was not copied to "
                f"{self.safe_url}: {reason_of(error)}; trying again"
            )
            self._warn_once((type(error), getattr(error, "errno", None)), failed)
        else:
            if self._warned - {"slow"}:
                self._warn_once("works", f"{self.safe_url} works again")
            self._warned &= {"slow"}
        with self._changed:
            self._copied = path if copied else self._copied
            self._changed.notify_all()
        return copied

    def _states_in(self, fs: AbstractFileSystem, folder: str) -> list[str]:
        """The names of the states of this name in ``folder``, newest first."""
        found = [file for file in names_in(fs, folder) if is_state(file, self.name)]
        return sorted(found, key=update_of, reverse=True)

    def _prune(self, fs: AbstractFileSystem, folder: str, newest: str) -> None:
        """Delete this run's states except ``newest`` and the ``keep - 1`` before it. Those of later
        updates go as well: the run abandoned them when it returned to an earlier state."""
        others = [state for state in self._states_in(fs, folder) if state != newest]
        own = [state for state in others if state in self._own]
        kept = [state for state in own if update_of(state) < update_of(newest)][: self.keep - 1]
        for state in others if self._clearing else set(own).difference(kept):
            fs.rm_file(f"{folder}/{state}")
        self._clearing = False


def fetch_newest(
    mirror: Mirror, folder: Path, newer_than: int, check: Callable[[Path], object] = bool
) -> tuple[Path | None, list[str]]:
    """Fetch the newest good state of an update after ``newer_than`` (-1: any) into ``folder``.

    Args: check: raises CheckpointError if a file that was fetched is no state.
    Returns: its path or None, and a message for each state that could not be used.
    Raises: MirrorError; CheckpointError if ``newer_than`` is -1 and none of the states can be."""
    complaints, failure = [], None
    for state in mirror.states():
        if update_of(state) > newer_than:
            try:
                path = mirror.fetch(state, folder)
                try:
                    check(path)
                except CheckpointError:
                    path.unlink()
                    raise
                return path, complaints
            except (CheckpointError, MirrorError) as error:
                complaints.append(str(error))
                failure = error
    if newer_than < 0 and isinstance(failure, MirrorError):
        raise failure
    if complaints and newer_than < 0:
        raise CheckpointError(
            f"no state of {mirror.name} at {mirror.safe_url} can be used: {' '.join(complaints)} "
            f"Restore one, or start afresh without --checkpoint_mirror."
        )
    return None, complaints
