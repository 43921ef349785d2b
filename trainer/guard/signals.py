"""SIGTERM, SIGINT and SIGHUP: finish the update, save, stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType

from trainer.console import drop_output
from trainer.errors import Interrupted

STOPPING = ("SIGTERM", "SIGINT", "SIGHUP")


class StopSignals:
    """Whether a signal asked this process to stop. During training the handler only takes note.

    Before the first update and after the last save there is nothing to finish; there it raises
    Interrupted at once."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self.training = False
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one stops at once
            with contextlib.suppress(OSError):  # not print: it may have been interrupted itself
                os.write(2, b"\nstopping after this update; Ctrl-C again stops without saving\n")
        if number == signal.SIGHUP:
            for terminal in self._terminals:  # gone; each write to it would fail
                drop_output(terminal)
        if not self.training:
            raise Interrupted(f"stopping: {self.received} received, there was nothing to save")

    @contextlib.contextmanager
    def heard(self) -> Generator["StopSignals"]:
        """Listen, except to what is ignored already, as nohup has SIGHUP ignored."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for name in STOPPING:
                number = getattr(signal, name)
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
