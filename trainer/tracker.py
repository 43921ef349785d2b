"""SwanLab behind two methods. Its failures never affect training."""

import contextlib
import importlib.util
import io
import signal
import sys
import uuid
from collections.abc import Generator, Iterable
from typing import Literal


class NoTracker:
    """Stands in for SwanLabTracker without ``--use_wandb``; keeps the id of the run's tracker."""

    def __init__(self, run_id: str | None = None) -> None:
        self.id = run_id

    def log(self, metrics: dict, step: int) -> None:
        """Does nothing."""

    def finish(self, error: str | None = None) -> None:
        """Does nothing."""


@contextlib.contextmanager
def contained() -> Generator[None]:
    """Turn any failure into one line, silence SwanLab's output, and undo the SIGINT handler and the
    exception hook that it installs."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        print(f"warning: swanlab: {type(error).__name__}: {reason:.200}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.excepthook = hook


class SwanLabTracker:
    """A SwanLab run: in the cloud if the user is logged in, otherwise in the local dashboard.

    Args:
        project, name: shown by SwanLab.
        config: all flags.
        log_dir: for the files of the local dashboard; ``swanlab watch <log_dir>`` shows them.
        run_id: the run to continue, or None for a new one.
        history: the metrics of earlier steps. The cloud continues a run by its id. The local
            dashboard makes a new entry, to which these metrics are logged again."""

    def __init__(
        self,
        project: str,
        name: str,
        config: dict,
        log_dir: str,
        run_id: str | None,
        history: Iterable[dict] = (),
    ) -> None:
        self.run = None
        self.id = run_id or f"{name}-{uuid.uuid4().hex[:8]}"
        with contained():
            import swanlab  # only if it is used

            # Not interactive, so that it never asks for a key.
            settings = swanlab.Settings(
                interactive=False,
                terminal=swanlab.Settings.Terminal(proxy_type="none"),
                probe=swanlab.Settings.Probe(monitor=False),
            )
            modes: list[Literal["online", "local"]] = ["online"] if settings.api_key else []
            if importlib.util.find_spec("swanboard"):
                modes.append("local")
            if not modes:
                raise RuntimeError("not logged in, no dashboard; pip install 'swanlab[dashboard]'")
            for mode in modes:
                with contained():
                    self.run = swanlab.init(
                        project=project,
                        name=name,
                        config=config,
                        log_dir=log_dir,
                        id=self.id,
                        resume="allow",
                        mode=mode,
                        color="#4C72B0",  # otherwise drawn from Python's generator
                        settings=settings,
                    )
                    break
        if self.run is not None and self.run.mode == "local":
            for metrics in history:
                self.log(metrics, metrics["step"])

    def log(self, metrics: dict, step: int) -> None:
        """Send the numbers of one step; other values are only in the metrics file."""
        if self.run is not None and self.run.alive:
            with contained():
                numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
                self.run.log(numbers, step=step)

    def finish(self, error: str | None = None) -> None:
        """Mark the run as successful, or as crashed with ``error``."""
        if self.run is not None and self.run.alive:
            with contained():
                self.run.finish(state="crashed" if error else "success", error=error)
