"""How every program here runs: versions that nobody tried are named, errors that people cause are
one line and an exit status."""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from trainer.console import write_line
from trainer.errors import Interrupted, exit_status_of

# Its ranges are those that the tests ran with.
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def untried_versions(requirements: Path = REQUIREMENTS) -> list[str]:
    """A line for each installed package whose version lies outside the range that was tried."""
    lines = []
    if not requirements.is_file():
        return []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        try:
            required = Requirement(line.partition(" #")[0])
            found = metadata.version(required.name)
        except InvalidRequirement:
            continue  # a comment or an option of pip that somebody added
        except metadata.PackageNotFoundError:
            continue  # whoever needs it says so
        if not required.specifier.contains(found, prereleases=True):
            lines.append(
                f"warning: {required.name} {found} is installed, but tried are {line}. If "
                f"something fails: pip install -r requirements.txt"
            )
    return lines


def run_program(program: Callable[[], None]) -> int:
    """Run it; an error that people cause becomes one line on stderr and an exit status."""
    if os.environ.get("RANK", "0") == "0":
        for line in untried_versions():
            write_line(partial(print, file=sys.stderr), line)
    try:
        program()
    except KeyboardInterrupt:
        write_line(print, "stopped. --from_resume 1 resumes from the last saved state.")
        return 130
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            write_line(print, str(stop))
        return stop.exit_status
    except Exception as error:
        status, message = exit_status_of(error), str(error)
        if status == 1:
            raise
        if status == 6:
            message = f"{error}. What was saved before is intact."
        if status == 7:
            less = " ".join(getattr(error, "__notes__", ["a lower --micro_batch_size"]))
            message = (
                f"out of memory: {message.splitlines()[0] if message else 'main memory'} The same "
                f"updates need less with {less}."
            )
        if getattr(error, "speaks", os.environ.get("LOCAL_RANK", "0") == "0"):  # not each rank
            write_line(partial(print, file=sys.stderr), f"error: {message}")
        return status
    return 0
