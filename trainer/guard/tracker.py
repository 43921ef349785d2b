"""SwanLab behind three calls. Whatever it does, training continues as if it were not there."""

import contextlib
import importlib.util
import io
import signal
import sys
import uuid
from collections.abc import Generator, Iterable
from typing import Literal


class NoTracker:
    """What training talks to without ``--use_wandb``."""

    def __init__(self, run_id: str | None = None) -> None:
        self.id = run_id

    def log(self, metrics: dict, step: int) -> None:
        """Nothing."""

    def finish(self, error: str | None = None) -> None:
        """Nothing."""


@contextlib.contextmanager
def contained() -> Generator[None]:
    """Turn any failure into one line, keep SwanLab's prints off the console, undo its hooks.

    It installs its own SIGINT handler and exception hook, which are ours to decide."""
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
    """A SwanLab run: in the cloud for whoever is logged in, else in the local dashboard.

    Args:
        project, name: as SwanLab shows them.
        config: all flags.
        log_dir: where the local dashboard's files go; ``swanlab watch <log_dir>`` shows them.
        run_id: the run to continue, or None for a new one.
        history: the metrics of the steps before this start. The cloud continues a run by its id;
            the local dashboard cannot, so there the run's newest entry is told its past."""

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
            import swanlab  # not before it is asked for

            # Not interactive: it never asks for a key, whatever it finds.
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
                        color="#4C72B0",  # without one SwanLab draws it from Python's generator
                        settings=settings,
                    )
                    break
        if self.run is not None and self.run.mode == "local":
            for metrics in history:
                self.log(metrics, metrics["step"])

    def log(self, metrics: dict, step: int) -> None:
        """Send one step's numbers; other values stay in the metrics file."""
        if self.run is not None and self.run.alive:
            with contained():
                numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
                self.run.log(numbers, step=step)

    def finish(self, error: str | None = None) -> None:
        """Close the run as successful, or as crashed with ``error``."""
        if self.run is not None and self.run.alive:
            with contained():
                self.run.finish(state="crashed" if error else "success", error=error)
