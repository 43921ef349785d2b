"""What differs between systems, and what a program does before its imports. Needs no package.

Linux is what the tests run on; where a system lacks something here, the function says what then.
"""

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
WITHOUT_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
LEFT_EARLY = 75  # see trainer/errors.py

_program_began: float | None = None  # of the program that is this process, until its run begins
_run_began = time.monotonic()


def begin_program() -> None:
    """Count time, and answer signals, from here on: the imports that follow take seconds.

    For the first line of a program, not for a function that a notebook calls."""
    global _program_began
    _program_began = time.monotonic()
    answer_signals(leave)


def answer_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Have ``handler`` answer the signals that ask to stop, except for those that are ignored, such
    as SIGHUP under nohup. Returns: who answered each before."""
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def end_program() -> None:
    """Ignore further signals if this process began with ``begin_program``: only its status is left.

    Python itself would take the handlers back before it ends."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is leave:
            signal.signal(number, signal.SIG_IGN)


def leave(number: int, frame: FrameType | None) -> None:
    """End the process: outside training there is nothing to save."""
    with suppress(OSError):
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(1, f"stopping: {name} received, there was nothing to save\n".encode())
    os._exit(LEFT_EARLY)


def begin_run() -> None:
    """Count a run's time from here on, or from where the program that is this process began."""
    global _program_began, _run_began
    _run_began = time.monotonic() if _program_began is None else _program_began
    _program_began = None


def run_time() -> float:
    """Seconds since the run began, imports included if this process began with it."""
    return time.monotonic() - _run_began


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or this process ends, as POSIX locks do.

    Returns: whether there are locks; a network disk, or Windows, may have none.
    Raises: BlockingIOError if another process holds the lock; OSError."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # POSIX allows either
        raise BlockingIOError(error.errno, error.strerror) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return False
    return True


def sync_folder(folder: str | os.PathLike[str]) -> bool:
    """Make the names in a folder survive a power loss.

    Returns: False if the disk cannot do that, as with CIFS and some of FUSE. Raises: OSError."""
    if os.name != "posix":  # a folder cannot be opened, and needs no sync
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in WITHOUT_FOLDER_SYNC:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def end_with_parent() -> None:
    """Have SIGTERM sent to this process when the one that started it ends; Linux alone can.

    A kill of torchrun would leave its ranks training, with nobody to stop them."""
    parent, pr_set_pdeathsig = os.getppid(), 1  # from prctl.h
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGTERM)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed CPU tensors.

    By default it returns large blocks immediately, and each step requests the same pages again."""
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


def peak_memory() -> int:
    """Bytes of main memory that this process has held at once; 0 on Windows, which has no such
    call."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
