"""What a run prints: on the first rank alone, above the progress bar, whatever the console does."""

from tqdm import tqdm

from trainer.distributed import is_main_process
from trainer.signals import say


def log(line: str) -> None:
    """Print a line, on the main process only, above the progress bar if there is one."""
    if is_main_process():
        say(tqdm.write, line)
