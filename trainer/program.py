"""The frame of every command-line program here: a warning about untested package versions, and
user errors as one line on stderr with an exit status."""

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from trainer.console import write_line
from trainer.distributed import uses_nccl
from trainer.errors import Interrupted, RankError, exit_status_of
from trainer.host import begin_run, end_program

# Declares the version ranges that the tests were run with.
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def untested_versions(requirements: Path = REQUIREMENTS) -> list[str]:
    """A warning for each installed package whose version is outside the tested range."""
    lines = []
    if not requirements.is_file():
        return []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        try:
            required = Requirement(line.partition(" #")[0])
            found = metadata.version(required.name)
        except InvalidRequirement:
            continue  # a comment or a pip option that a user added
        except metadata.PackageNotFoundError:
            continue  # the code that needs it reports that
        if not required.specifier.contains(found, prereleases=True):
            lines.append(
                f"warning: {required.name} {found} is installed, but {line} was tested. If "
                f"something fails, run: pip install -r requirements.txt"
            )
    return lines


def run_program(program: Callable[[], None]) -> int:
    """Run ``program`` and return its exit status; a user error is printed as one line on stderr."""
    begin_run()
    try:
        return status_of(program)
    finally:
        end_program()


def status_of(program: Callable[[], None]) -> int:
    """As ``run_program``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks a character shows another
            stream.reconfigure(errors="replace")
    if os.environ.get("RANK", "0") == "0":
        for line in untested_versions():
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
            message = f"{error}. Everything saved before is intact."
        if status == 7:
            less = " ".join(getattr(error, "__notes__", ["a lower --micro_batch_size"]))
            message = (
                f"out of memory: {message.splitlines()[0] if message else 'main memory.'} The same "
                f"updates need less with {less}."
            )
        if getattr(error, "prints", os.environ.get("LOCAL_RANK", "0") == "0"):  # once
            write_line(partial(print, file=sys.stderr), f"error: {message}")
        if isinstance(error, RankError) and uses_nccl():  # an exchange is still on the device
            sys.stdout.flush()
            os._exit(status)
        return status
    return 0
