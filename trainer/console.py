"""Console output, on the main process only. A run survives the loss of its console."""

import os
import sys
from collections.abc import Callable

from tqdm import tqdm

from trainer.distributed import is_main_process


def log(line: str) -> None:
    """Print a line on the main process, above the progress bar if there is one."""
    if is_main_process():
        write_line(tqdm.write, line)


def write_line(write: Callable[[str], None], line: str) -> None:
    """Call ``write(line)``; silence the console if it is gone (a closed pipe, a lost terminal)."""
    for descriptor in (1, 2):
        try:
            write(line)
            return sys.stdout.flush()
        except OSError:
            drop_output(descriptor)


def drop_output(descriptor: int) -> None:
    """Redirect a file descriptor whose reader is gone to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
