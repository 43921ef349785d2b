"""What can end a run, and the exit status that tells a supervisor which it was.

0  complete                          6  disk or other input and output
1  a mistake in this program         7  out of memory
2  flags, or a folder in use         8  another rank is dead or stuck
3  data                             75  stopped by a signal, saved; the same command resumes
4  weights or states               130  a second Ctrl-C: stopped at once
5  loss or gradient not finite
"""

import torch


class SettingsError(ValueError):
    """Flags that cannot be used; the message says what was found and what was expected."""

    exit_status = 2


class CheckpointError(ValueError):
    """Weights or a state cannot be used, or must not be overwritten; nothing was changed."""

    exit_status = 4


class BadUpdateError(ValueError):
    """Too many updates in a row had a loss or gradient that is not finite; none was applied."""

    exit_status = 5


class RankError(ValueError):
    """Another rank died or hangs; this one cannot continue without it.

    Args: speaks: whether this rank is the one to say so."""

    exit_status = 8

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


class Interrupted(Exception):
    """A signal asked the run to stop, and it did so in order."""

    exit_status = 75


def printable(found: object) -> str:
    """Text from a file, for one line of a message: nothing in it breaks or colours the line."""
    text = str(found)
    return text if text.isprintable() else ascii(text)[1:-1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device or machine are out of memory; torch has a class for it on CUDA only."""
    words = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def exit_status_of(error: BaseException) -> int:
    """The status that this error ends the program with."""
    if is_out_of_memory(error):
        return 7
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return getattr(error, "exit_status", 6 if isinstance(error, OSError) else 1)
