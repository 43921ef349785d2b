"""The errors that can end a run, and the exit status of each, for a supervisor.

0  complete                          6  disk or other input and output
1  a bug in this program             7  out of memory
2  flags, or a folder in use         8  another rank is dead or stuck
3  data                             75  stopped by a signal, saved; the same command resumes
4  weights or states               130  stopped immediately, by a second Ctrl-C
5  loss, gradient or weights not finite
"""

import torch


class SettingsError(ValueError):
    """Flags cannot be used; the message states what was found and what was expected."""

    exit_status = 2


class CheckpointError(ValueError):
    """Weights or a state cannot be used or must not be overwritten; nothing was changed."""

    exit_status = 4


class BadUpdateError(ValueError):
    """Updates were not finite, too many in a row, and none was applied; or the weights are not."""

    exit_status = 5


class RankError(ValueError):
    """Another rank died or hangs, so this one cannot continue.

    Args: prints: whether this rank prints the message; one does."""

    exit_status = 8

    def __init__(self, message: str, prints: bool = True) -> None:
        super().__init__(message)
        self.prints = prints


class Interrupted(Exception):
    """The run stopped in an orderly way, as a signal asked it to."""

    exit_status = 75


def printable(found: object) -> str:
    """Text from a file, safe to show in a one-line message: no line breaks or control codes."""
    text = str(found)
    return text if text.isprintable() else ascii(text)[1:-1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine is out of memory; torch has a class for it only on CUDA."""
    words = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def reason_of(error: BaseException) -> str:
    """The kind of an error, and the first line of its message."""
    error = getattr(error, "inner_exception", error)  # torch's compiler wraps a backend's
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {printable(lines[0]):.300}".rstrip(".")


def exit_status_of(error: BaseException) -> int:
    """The exit status of a program that ends with this error."""
    if is_out_of_memory(error):
        return 7
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return getattr(error, "exit_status", 6 if isinstance(error, OSError) else 1)
