"""Handling of SIGTERM, SIGINT and SIGHUP: finish the update, save, stop."""

import os
import signal
import threading
from contextlib import ExitStack, suppress
from types import FrameType

from trainer.console import drop_output
from trainer.errors import Interrupted
from trainer.host import answer_signals


class StopSignals:
    """Records whether a signal asked this process to stop.

    Outside training (before the first update, after the last save) there is nothing to finish, so
    the handler raises Interrupted."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self.training = False
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one stops immediately
            with suppress(OSError):  # not print(), which may be what was interrupted
                os.write(2, b"\nstopping after this update; Ctrl-C again stops without saving\n")
        if self.received == "SIGHUP":
            for terminal in self._terminals:  # it is gone, so each write would fail
                drop_output(terminal)
        if not self.training:
            raise Interrupted(f"stopping: {self.received} received, there was nothing to save")

    def install(self, scope: ExitStack) -> None:
        """Answer signals until ``scope`` ends, if this is the main thread: no other can."""
        if threading.current_thread() is threading.main_thread():
            for number, before in answer_signals(self._handle).items():
                scope.callback(signal.signal, number, before)
