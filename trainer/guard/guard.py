"""What keeps a rented machine from hurting a run, behind a few verbs.

One run a folder, states that outlive kills and disks, signals, the time that was paid for. What an
update reads or changes knows nothing of it. Each verb is called on every rank, and does itself what
only the first one may do.
"""

import contextlib
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from types import TracebackType

from model.model_minimind import MiniMindConfig
from trainer.console import log
from trainer.distributed import on_main_process, restarted
from trainer.errors import Interrupted
from trainer.flags import TrainConfig
from trainer.guard.check_state import changed_rounding, check_state
from trainer.guard.micro_batch import suggest_micro_batch
from trainer.guard.run_folder import RunFolder, find_state, record_lost_rank, state_to_anneal
from trainer.guard.signals import StopSignals
from trainer.metrics import Metrics, complete_files
from trainer.run import Run


class Guard:
    """A context: signals are heard inside, and how the run ends is written down.

    Its verbs, in the order of a run: ``state``, ``begin``, ``training``, ``stopping``, ``save``."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.stop = StopSignals()
        self.scope = ExitStack()  # closes what must learn how the run ends
        self.resumed = False

    def __enter__(self) -> "Guard":
        self.scope.enter_context(self.stop.heard())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.scope.__exit__(kind, error, trace)

    def state(self, model_config: MiniMindConfig) -> dict | None:
        """Hold the run's folders, and find the state to resume or to anneal from, if there is one.

        Raises: SettingsError if another run holds a folder; CheckpointError if files of another run
        would be overwritten, or if there are states and none is good; OSError."""
        config = self.config
        self.scope.push(partial(record_lost_rank, config.checkpoint_dir))
        self.folder = RunFolder(config, model_config)
        state = None
        if not config.dry_run:
            on_main_process(
                lambda: self.scope.enter_context(self.folder) and None
            )  # stays on this rank
            if config.from_resume or restarted():  # --max-restarts gives no flag
                state = find_state(config, model_config, self.folder)
            if state is None:
                on_main_process(self.folder.refuse_to_overwrite)
        self.resumed = state is not None
        if config.anneal_from and not self.resumed:
            state = state_to_anneal(config, config.anneal_from)
        return state

    def begin(self, run: Run, state: dict | None, num_bad_records: int) -> bool:
        """Become the run that saved ``state``, or a new one. Returns: whether anything is left.

        Raises: SettingsError if settings differ, CheckpointError if a part does not fit."""
        config = self.config
        self.scope.push(partial(suggest_micro_batch, run))
        if state is not None:
            check_state(state, run)
            run.restore(state)
            if changed := changed_rounding(state, run):
                log(f"note: saved with {changed}: the same run but for rounding")
        if run.budget and not config.dry_run:
            self.folder.seconds_spent(run.budget, self.resumed)
        if config.anneal_from and not self.resumed:
            run.anneal()
        if run.is_done and not run.evaluation_due:
            on_main_process(partial(complete_files, run))
            log(f"complete: all {run.total_rows:,} rows were trained on; nothing to do")
            return False
        if not config.dry_run:
            if not self.resumed:
                on_main_process(self.folder.delete_run)
            on_main_process(partial(self.folder.begin, run.step, num_bad_records))
        return True

    @contextlib.contextmanager
    def training(self) -> Generator[None]:
        """Inside, a signal is only noted; elsewhere nothing is to be saved, and it ends the run."""
        self.stop.training = True
        yield
        self.stop.training = False

    def stopping(self) -> bool:
        """Whether a signal asked this rank to stop."""
        return self.stop.received is not None

    def save(self, run: Run, metrics: Metrics) -> None:
        """Save the state, then the weights. Raises: OSError; CheckpointError if another run writes
        to the same folder."""
        with metrics.outside_training("saving"):
            on_main_process(self.folder.check_no_other_run)
            path, seconds = run.save(metrics.tracker.id)
            on_main_process(partial(self.folder.saved, path))
            metrics.log_save(seconds)

    def interrupted(self, run: Run, metrics: Metrics, saved: bool) -> Interrupted:
        """What ends a run that a signal stopped, on this rank or another."""
        if saved:
            return Interrupted(metrics.stop_message(self.stop.received))
        who = self.stop.received or "another rank's signal"
        return Interrupted(f"stopping: {who} received, nothing new to save")
