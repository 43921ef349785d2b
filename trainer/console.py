"""What a run prints, on the main process only; a console that is lost stops no run."""

import os
import sys
from collections.abc import Callable

from tqdm import tqdm

from trainer.distributed import is_main_process


def log(line: str) -> None:
    """Print a line, on the main process only, above the progress bar if there is one."""
    if is_main_process():
        write_line(tqdm.write, line)


def write_line(write: Callable[[str], None], line: str) -> None:
    """``write(line)``; a console that is gone (a closed pipe, a lost terminal) ends no run."""
    for descriptor in (1, 2):
        try:
            write(line)
            return sys.stdout.flush()
        except OSError:
            drop_output(descriptor)


def drop_output(descriptor: int) -> None:
    """Send what is written there to nowhere: its reader is gone, and training continues without."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
