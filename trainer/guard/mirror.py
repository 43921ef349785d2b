"""Copies of the states somewhere else, since a rented disk often goes with its machine.

A copy gets its name only after it was read back, so a cut connection leaves nothing that looks
whole. Whatever happens there, training continues and the local states stay as they are.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
from fsspec import AbstractFileSystem
from fsspec.config import conf

from trainer.checkpoint import digest, is_state, update_of, write_atomically
from trainer.errors import CheckpointError, Interrupted

PIECE = 2**22  # bytes in memory while a state is copied
PAUSES = (1, 5, 30, 60)  # seconds between attempts; the last one again and again
FAILING_PATIENCE = 20  # seconds for the last copy, on a machine that costs money meanwhile
PATIENCE = 60  # seconds without an answer, after which an sftp server counts as gone
PART = re.compile(r"\.(.+)\.[0-9a-f]{16}\.part")
SECRET = re.compile("KEY|SECRET|TOKEN|PASS", re.I)  # in names of variables and options
SECRET_IN_URL = re.compile(rf"://[^/]*:(?!\d*(/|$))|[?&][^=]*(sig|{SECRET.pattern})[^=]*=", re.I)

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else it prints tracebacks


class MirrorError(OSError):
    """The mirror cannot be read although a state may have to come from it."""

    exit_status = 6


def mirror_problems(url: str) -> list[str]:
    """What is wrong with ``--checkpoint_mirror``, in words; empty if nothing is."""
    if SECRET_IN_URL.search(url):  # and so it must not be repeated here
        return [
            "--checkpoint_mirror holds a password, or a port that is no number. Flags end up "
            "in logs: give an ssh key, ~/.aws or an environment variable instead."
        ]
    try:
        if "::" in url:  # a cache in between would answer when a copy is read back
            raise ValueError
        fsspec.get_filesystem_class(url.partition("://")[0] if "://" in url else "file")
    except ImportError as error:
        module = (getattr(error.__cause__, "name", None) or str(error)).partition(".")[0]
        package = {"smbclient": "smbprotocol"}.get(module, module)  # else they have one name
        return [f"--checkpoint_mirror {url} needs a package: pip install {package}"]
    except ValueError:
        return [
            f"--checkpoint_mirror {url} is no address that can be used. Pass a folder, or one "
            f"like sftp://user@host/folder or s3://bucket/folder."
        ]
    return []


def scrub(text: str) -> str:
    """``text`` without passwords in addresses and without what the environment keeps secret."""
    named = [*os.environ.items(), *(pair for options in conf.values() for pair in options.items())]
    known = {str(value) for name, value in named if SECRET.search(name) and len(str(value)) >= 6}
    for secret in sorted(known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    return re.sub(r"//[^/\s@]*:[^/\s]*@", "//***@", text)


def reason_of(error: Exception) -> str:
    """Its kind and the first line of its text, without secrets."""
    lines = scrub(str(error)).splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]:.200}"


@contextlib.contextmanager
def connected(url: str) -> Generator[tuple[AbstractFileSystem, str]]:
    """A file system and the folder in it. Never a cached one: it may be the one that broke."""
    is_ssh = url.startswith(("sftp://", "ssh://"))
    limits = {"timeout": PATIENCE, "channel_timeout": PATIENCE} if is_ssh else {}
    fs, folder = fsspec.url_to_fs(url, skip_instance_cache=True, **limits)
    try:
        if is_ssh:
            fs.ftp.get_channel().settimeout(PATIENCE)
        yield fs, folder.rstrip("/")
    finally:
        for part in ("ftp", "client"):
            with contextlib.suppress(Exception):  # most file systems have neither
                getattr(fs, part).close()


def names_in(fs: AbstractFileSystem, folder: str) -> list[str]:
    """The names in a folder; none if it is not there yet."""
    try:
        return [path.rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]
    except FileNotFoundError:
        return []


def open_binary(fs: AbstractFileSystem, path: str, mode: Literal["rb", "wb"]) -> Any:
    """A file of bytes; fsspec annotates it as text or bytes, whatever the mode."""
    return fs.open(path, mode)


def pieces(fs: AbstractFileSystem, path: str) -> Iterator[bytes]:
    """A file's bytes, in order."""
    size = fs.size(path)
    with open_binary(fs, path, "rb") as file:
        for start in range(0, size, PIECE):
            if hasattr(file, "prefetch"):  # paramiko: else it waits for every 32 KiB
                file.prefetch(min(start + PIECE, size))
            yield file.read(PIECE)


def copy(source: BinaryIO, fs: AbstractFileSystem, folder: str, state: str) -> None:
    """Write ``source`` under another name, read it back, then give it its name."""
    fs.makedirs(folder, exist_ok=True)
    part = f"{folder}/.{state}.{secrets.token_hex(8)}.part"
    try:
        with open_binary(fs, part, "wb") as target:
            if hasattr(target, "set_pipelined"):  # paramiko again
                target.set_pipelined()
            while piece := source.read(PIECE):
                target.write(piece)
            if getattr(fs, "local_file", False):  # or only the memory may be read back
                target.flush()
                os.fsync(target.fileno())
        arrived = hashlib.sha256()
        for piece in pieces(fs, part):
            arrived.update(piece)
        if arrived.hexdigest()[:32] not in state:
            raise OSError(f"the {fs.size(part):,} bytes that arrived are not those saved")
        fs.mv(part, f"{folder}/{state}")
    except Exception:
        with contextlib.suppress(Exception):  # if the connection is cut, the next attempt does it
            fs.rm_file(part)
        raise


class Mirror:
    """Where the states called ``name`` are copied to, by one thread in the background.

    Args:
        url: a folder, or any address that fsspec understands.
        warn: is given a line when something fails or works again, by whichever thread.
        keep: so many states of this run stay there."""

    def __init__(self, url: str, name: str, warn: Callable[[str], None], keep: int = 2) -> None:
        self.url, self.name, self.warn, self.keep = url, name, warn, keep
        self.safe_url = scrub(url)
        self._own: set[str] = set()  # states that may be deleted there
        self._clearing = False  # all may be
        self._told: set[object] = set()  # kinds of failures since a copy last succeeded
        self._changed = threading.Condition()  # guards the rest
        self._offered: Path | None = None  # the newest
        self._taken: Path | None = None  # by the thread
        self._copied: Path | None = None
        self._ended = False
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")  # botocore's retries draw from `random`
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def states(self) -> list[str]:
        """Names of the states there, most updates first. Raises: MirrorError."""
        return sorted(self._read(self._states_in), key=update_of, reverse=True)

    def fetch(self, state: str, folder: Path) -> Path:
        """Bring a state into a local folder. Raises: CheckpointError if damaged; MirrorError."""
        data = self._read(lambda fs, there: b"".join(pieces(fs, f"{there}/{state}")))
        if digest(data) not in state:
            raise CheckpointError(
                f"{self.safe_url}/{state} is damaged: its {len(data):,} bytes are not those "
                f"written."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / state, data)
        return folder / state

    def owns(self, names: Iterable[str]) -> None:
        """States that this run came from. Only these and those offered are ever deleted there."""
        self._own.update(names)

    def clear(self) -> None:
        """Once the next state is there, delete all others: the run of this name starts afresh."""
        self._clearing = True

    def offer(self, path: Path) -> None:
        """Copy a state in the background; of several that wait, only the newest."""
        with self._changed:
            skipped = self._offered if self._offered != self._taken else None
            self._own.add(path.name)
            self._offered = path
            self._changed.notify_all()
        if skipped:
            self._tell_once(
                "slow",
                f"{self.safe_url} is still busy with an older state; that of "
                f"update {update_of(skipped.name):,} is left out",
            )

    def finish(self, seconds: float) -> None:
        """Wait, at most so long, until the newest state is there; less for a mirror that fails.
        After that nothing is copied."""
        since = time.monotonic()
        with self._changed:
            while self._copied != self._offered:
                most = min(seconds, FAILING_PATIENCE) if self._told - {"slow"} else seconds
                if (left := since + most - time.monotonic()) <= 0:
                    break
                self._changed.notify_all()  # no long pauses now
                self._changed.wait(min(left, 1))  # in slices, for the sake of signals
            if (path := self._offered) is not None and path != self._copied:
                self._tell_once(
                    path,
                    f"the state of update {update_of(path.name):,} is not at "
                    f"{self.safe_url}; it is only at {path}",
                )
            self._ended = True
            self._changed.notify_all()

    def _tell_once(self, kind: object, text: str) -> None:
        """Warn, unless it was said before or is too late. A closed console stops nothing."""
        if kind not in self._told and not self._ended:
            self._told.add(kind)
            with contextlib.suppress(Exception):
                self.warn(f"warning: mirror: {text}")

    def _read(self, task: Callable[[AbstractFileSystem, str], Any]) -> Any:
        """What ``task`` finds there, at a second or third attempt if need be."""
        for pause in (*PAUSES[:2], 0):
            try:
                with connected(self.url) as (fs, folder):
                    return task(fs, folder)
            except Interrupted:
                raise
            except Exception as error:
                reason = reason_of(error)
            time.sleep(pause)
        raise MirrorError(f"--checkpoint_mirror {self.safe_url} cannot be read: {reason}")

    def _work(self) -> None:
        """The thread: try the newest offer until it is there, then wait for the next."""
        failures = 0
        while (path := self._next(failures)) is not None:
            failures = 0 if self._attempt(path) else failures + 1

    def _next(self, failures: int) -> Path | None:
        """Wait for a state to copy, after a pause if the last attempts failed. None: no more."""
        with self._changed:
            if failures and self._offered == self._taken and not self._ended:
                self._changed.wait(PAUSES[min(failures, len(PAUSES)) - 1])
            self._changed.wait_for(lambda: self._ended or self._offered != self._copied)
            if self._ended:
                return None
            self._taken = self._offered
            return self._taken

    def _attempt(self, path: Path) -> bool:
        """Copy a state over a connection of its own. Whether it is there now."""
        copied = False
        try:
            with path.open("rb") as source, connected(self.url) as (fs, folder):
                for name in names_in(fs, folder):  # left by a cut connection or a killed process
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
            self._tell_once((type(error), getattr(error, "errno", None)), failed)
        else:
            if self._told - {"slow"}:
                self._tell_once("works", f"{self.safe_url} works again")
            self._told &= {"slow"}
        with self._changed:
            self._copied = path if copied else self._copied
            self._changed.notify_all()
        return copied

    def _states_in(self, fs: AbstractFileSystem, folder: str) -> set[str]:
        """The states of this name."""
        return {file for file in names_in(fs, folder) if is_state(file, self.name)}

    def _prune(self, fs: AbstractFileSystem, folder: str, newest: str) -> None:
        """Of this run's states, leave ``newest`` and those before it, but no abandoned one:
        a state of more updates is from before the run was taken back to an earlier one."""
        others = self._states_in(fs, folder) - {newest}
        own = others & self._own
        before = [state for state in own if update_of(state) < update_of(newest)]
        kept = sorted(before, key=update_of, reverse=True)[: self.keep - 1]
        for state in others if self._clearing else own.difference(kept):
            fs.rm_file(f"{folder}/{state}")
        self._clearing = False


def fetch_newest(mirror: Mirror, folder: Path, newer_than: int) -> tuple[Path | None, list[str]]:
    """Bring the newest good state of more than ``newer_than`` updates (-1: any) into ``folder``.

    Returns: its path, or None, and a line on each damaged one passed over.
    Raises: MirrorError; CheckpointError if any would do and all are damaged."""
    complaints = []
    for state in mirror.states():
        if update_of(state) > newer_than:
            try:
                return mirror.fetch(state, folder), complaints
            except CheckpointError as error:
                complaints.append(str(error))
    if complaints and newer_than < 0:
        raise CheckpointError(
            f"no state of {mirror.name} at {mirror.safe_url} can be used: {' '.join(complaints)} "
            f"Restore one, or start afresh without --checkpoint_mirror."
        )
    return None, complaints
