"""Protects a run from its machine, behind a few methods.

It covers locked folders, states that survive kills and lost disks, signals, and the time budget.
The code of an update knows nothing of it. Call every method on every rank; what only rank 0 may do
is handled inside.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from model.model_minimind import MiniMindConfig
from trainer.console import log
from trainer.distributed import on_main_process, restarted
from trainer.errors import Interrupted
from trainer.flags import TrainConfig
from trainer.guard.check_state import changed_rounding, check_state
from trainer.guard.run_folder import RunFolder, find_state, record_lost_rank, state_to_anneal
from trainer.guard.signals import StopSignals
from trainer.metrics import Metrics, complete_files
from trainer.micro_batch import suggest_micro_batch
from trainer.run import Run


class Guard:
    """A context manager that handles signals, and records how the run ends.

    Its methods, in order of use: ``state``, ``begin``, ``training``, ``stopping``, ``save``."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.stop = StopSignals()
        self.scope = ExitStack()  # its callbacks receive the error that ends the run

    def __enter__(self) -> "Guard":
        self.stop.install(self.scope)
        return self

    def __exit__(self, *error: Any) -> None:
        self.scope.__exit__(*error)

    def state(self, model_config: MiniMindConfig) -> dict | None:
        """Lock the run's folders, and find the state to resume or to anneal from, if any.

        Raises: SettingsError if another run has locked a folder; CheckpointError if another run's
        files would be overwritten, or if there are states but none is good; OSError."""
        config = self.config
        self.scope.push(partial(record_lost_rank, config.checkpoint_dir))
        self.folder = RunFolder(config, model_config)
        state = None
        if not config.dry_run:
            # "and None": the result is sent to all ranks, which a RunFolder must not be.
            on_main_process(lambda: self.scope.enter_context(self.folder) and None)
            if config.from_resume or restarted():  # torchrun restarts with the same flags
                state = find_state(self.folder)
            if state is None:
                on_main_process(self.folder.refuse_to_overwrite)
        self.resumed = state is not None
        if config.anneal_from and not self.resumed:
            state = state_to_anneal(config, config.anneal_from)
        return state

    def begin(self, run: Run, state: dict | None, num_bad_records: int) -> bool:
        """Resume from ``state``, or begin a new run. Returns: whether there is anything left to do.

        Raises: SettingsError if settings differ, CheckpointError if a part does not fit."""
        config = self.config
        self.scope.push(partial(suggest_micro_batch, run))
        if state is not None:
            check_state(state, run)
            run.restore(state)
            if changed := changed_rounding(state, run):
                log(f"note: saved with {changed}: the same run except for rounding")
        if config.anneal_from and not self.resumed:
            run.anneal()
        if run.budget and not config.dry_run:
            self.folder.track_time(run.budget, self.resumed)
        if run.is_done and not run.evaluation_due:
            on_main_process(partial(complete_files, run))
            log(f"complete: all {run.total_rows:,} rows were trained on; nothing to do")
            return False
        if not config.dry_run:
            if not self.resumed:
                on_main_process(self.folder.delete_run)
            on_main_process(partial(self.folder.begin, run.step, num_bad_records, run.budget))
        return True

    @contextmanager
    def training(self, run: Run) -> Generator[None]:
        """A context in which signals are only noted. Outside it, nothing needs to be saved, and a
        signal ends the run immediately."""
        on_main_process(partial(self.folder.tell, fast_paths=run.fast_paths))
        self.stop.training = True
        yield
        self.stop.training = False

    def stopping(self) -> bool:
        """Whether a signal asked this rank to stop."""
        return self.stop.received is not None

    def save(self, run: Run, metrics: Metrics) -> None:
        """Save the state, then the weights.

        Raises: OSError; CheckpointError if another run writes to the same folder."""
        with metrics.outside_training("saving"):
            on_main_process(self.folder.check_no_other_run)
            path, seconds = run.save(metrics.tracker.id)
            on_main_process(partial(self.folder.add_state, path))
            metrics.log_save(seconds)

    def interrupted(self, run: Run, metrics: Metrics, saved: bool) -> Interrupted:
        """The error to raise in a run that was stopped by a signal, to this rank or another."""
        received = self.stop.received
        cause = f"{received} received" if received else "another rank received a signal"
        outcome = f"saved update {run.step:,} in {metrics.seconds_to_save:.1f} s"
        return Interrupted(f"stopping: {cause}, {outcome if saved else 'nothing new to save'}")
