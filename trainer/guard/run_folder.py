"""Ensures one run per folder, and maintains ``run_state.json``, the status of the run.

A supervisor reads that file, since torchrun exits with 1 whatever the ranks returned:

    {"status": "running" | "interrupted" | "complete" | "failed", "code": the exit status or null,
     "run": "pretrain_768", "step": last saved update, "reason": "...", "pid": ..., "host": ...,
     "since": "2026-11-22 10:02:11", "bad_records": number of records skipped,
     "seconds_spent": of --max_minutes, summed over all starts,
     "fast_paths": {"compiled layers": "used", or why it is not, ...}}
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from model.model_minimind import MiniMindConfig
from trainer import host
from trainer.checkpoint import (
    checkpoint_name,
    is_good,
    is_state,
    list_states,
    newest_for_all,
    read_state,
    remove,
    remove_partial_files,
    update_of,
    write_atomically,
)
from trainer.console import log, write_line
from trainer.distributed import is_main_process, on_main_process
from trainer.errors import CheckpointError, Interrupted, RankError, SettingsError, exit_status_of
from trainer.flags import TrainConfig
from trainer.guard.check_state import check_layout
from trainer.guard.mirror import Mirror, MirrorError, fetch_newest
from trainer.plan import NUM_CLOCK_CHECKS, Budget
from trainer.reading import read_json
from trainer.weights import weights_path

RUN_STATE = "run_state.json"
FORM = {"status": str, "run": str, "step": int, "pid": int, "host": str, "since": str}
LOCK_TRIES = 20  # in a second, for a lock that a process that is being killed may still hold
MIRROR_SECONDS = 600.0  # to wait for the last copy


class RunFolder:
    """A context manager that locks the run's folders, and records how the run ends.

    Only the main process enters it. The locks are POSIX locks, which belong to the process: they
    do not outlive a kill, and child processes do not inherit them.

    Raises: SettingsError if another run has locked a folder, OSError if one is not writable."""

    def __init__(self, args: TrainConfig, config: MiniMindConfig) -> None:
        self.args, self.name = args, checkpoint_name(args.save_weight, config)
        self.folder, self.save_dir = Path(args.checkpoint_dir), Path(args.save_dir)
        self.weights = weights_path(args.save_dir, args.save_weight, config)
        self.locks: list[int] = []
        self.own_states: set[Path] = set()
        self.ended, self.writing = threading.Event(), threading.RLock()
        self.before_first_save = False  # whether this start goes on with one that saved nothing
        self.mirror: Mirror | None = None
        if args.checkpoint_mirror and is_main_process():
            warn = partial(write_line, print)
            self.mirror = Mirror(args.checkpoint_mirror, self.name, warn, args.keep_states)
        self.content: dict[str, Any] = {
            "status": "running",
            "code": None,
            "run": self.name,
            "step": 0,
            "reason": "",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "bad_records": 0,
            "seconds_spent": 0.0,
            "fast_paths": {},
        }

    def __enter__(self) -> "RunFolder":
        for flag, folder, lock in (
            ("--checkpoint_dir", self.folder, ".lock"),
            ("--save_dir", self.save_dir, f".{self.name}.lock"),
        ):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock(flag, folder / lock)
                write_atomically(folder / f"{self.name}.probe", b"").unlink()
                if not host.sync_folder(folder):
                    log(
                        f"note: {folder} cannot be told to keep the names of its files: what was "
                        f"saved last may be lost if the power fails"
                    )
            except OSError as error:
                raise OSError(f"cannot write to {flag} {folder}: {error.strerror}") from None
        last = read_run_state(self.folder)
        spent = last.get("seconds_spent")
        first = last.get("step") == 0 or bool(self.args.anneal_from)  # which begins elsewhere
        unfinished = first and last.get("status") != "complete"
        self.before_first_save = bool(self.args.from_resume) and unfinished
        if last.get("run") == self.name and isinstance(spent, float) and 0 < spent < math.inf:
            self.content["seconds_spent"] = spent
        if last.get("status") == "running":
            log(
                f"note: the last run here was killed, or ran out of memory, some time after "
                f"update {last.get('step', 0):,}"
            )
        places = [(self.folder, self.name), (self.folder, "run_state"), (self.save_dir, self.name)]
        for folder, name in places:
            for part in remove_partial_files(folder, name):
                log(f"note: removed {part.name}, a partial file of a killed run")
        if last.get("status") != "complete":  # restarting a complete run changes nothing
            self.write()
        return self

    def _lock(self, flag: str, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        for _ in range(LOCK_TRIES):
            with contextlib.suppress(BlockingIOError):
                if not host.lock(descriptor):
                    log(
                        f"note: {path.parent} has no locks: another run in the same folder is "
                        f"noticed only when one of them saves"
                    )
                return self.locks.append(descriptor)
            time.sleep(1 / LOCK_TRIES)
        os.close(descriptor)
        last, owner = read_run_state(self.folder), "another run"
        if last.get("status") == "running":
            owner = f"{last['run']}, pid {last['pid']} on {last['host']} since {last['since']}"
        raise SettingsError(f"{flag} {path.parent} is in use by {owner}. Choose another {flag}.")

    def write(self, **changes: object) -> None:
        """Replace ``run_state.json``."""
        with self.writing:
            self.content |= changes
            text = json.dumps(self.content, indent=1, ensure_ascii=False)
            write_atomically(self.folder / RUN_STATE, text.encode())

    def tell(self, **changes: object) -> None:
        """As ``write``; but a disk that fails is left to the next save, which tries it twice."""
        with contextlib.suppress(OSError):
            self.write(**changes)

    def files(self) -> list[Path]:
        """The files of an earlier run of this name: states, newest first, and weights."""
        weights = (self.weights, self.weights.with_suffix(".json"))
        states = list_states(self.folder, self.name)
        return [*states, *(path for path in weights if path.exists())]

    def refuse_to_overwrite(self) -> None:
        """Raises: CheckpointError if saving would replace the files of an earlier run."""
        taken: list = self.files()
        if self.mirror is not None:
            with contextlib.suppress(MirrorError):  # unreachable: copying will warn
                taken += [f"{self.mirror.safe_url}/{name}" for name in self.mirror.states()]
        if taken and not self.args.overwrite:
            way = "--from_resume 1 resumes it"
            if not any(is_state(str(found).rpartition("/")[2]) for found in taken):
                own = self.args.save_weight
                way = f"No state of it is left: --from_weight {own} trains its weights further"
            raise CheckpointError(
                f"{taken[0]} belongs to an earlier run. {way}, "
                f"--save_weight NAME starts another run beside it, --overwrite 1 deletes it."
            )

    def delete_run(self) -> None:
        """--overwrite 1: delete the earlier run of this name."""
        for path in self.files():
            path.unlink()
        if self.mirror is not None and self.args.overwrite:
            self.mirror.clear()

    def fetch(self, update: int | None) -> None:
        """Fetch the mirror's newest state if it is newer than the good local ones, or the state of
        ``update`` unless there is a good local one.

        Raises: MirrorError, CheckpointError if that fails and there is no good local state."""
        if self.mirror is None:
            return
        good = [update_of(path) for path in list_states(self.folder, self.name) if is_good(path)]
        try:
            there = self.mirror.states()
            self.mirror.add_own(there)
            if update is None:
                newest = max(good, default=-1)
                found, complaints = fetch_newest(self.mirror, self.folder, newest, usable)
                for complaint in complaints:
                    log(f"warning: {complaint}")
                if found:
                    log(f"fetched {found.name} from the mirror")
            elif update not in good:
                for name in there:
                    if update_of(name) == update:
                        self.mirror.fetch(name, self.folder)
        except MirrorError as error:
            if not good:
                raise
            log(f"warning: {error}")

    def set_aside(self, update: int) -> None:
        """Abandon the states after ``update``, because the run returns to that one.

        They are deleted once the first state of the new branch has been saved."""
        for path in list_states(self.folder, self.name):
            if update_of(path) > update:
                path.rename(path.with_suffix(".abandoned"))

    def track_time(self, budget: Budget, resumed: bool) -> None:
        """Make the budget count the time of earlier starts, and record the time of this one.

        Also of starts that ended before they had saved anything, if this one goes on with them."""
        if resumed or self.before_first_save:
            budget.spent_before = max(budget.spent_before, self.content["seconds_spent"])
        budget.keep = lambda seconds: self.tell(seconds_spent=round(seconds, 3))

    def begin(self, step: int, num_bad_records: int, budget: Budget | None) -> None:
        """Record that training begins after ``step`` updates; later states could not be used."""
        self.set_aside(step)
        self.own_states = set(list_states(self.folder, self.name))
        if self.mirror is not None:
            self.mirror.add_own(path.name for path in self.own_states)
        self.write(step=step, bad_records=num_bad_records)
        if budget is not None:
            threading.Thread(target=self._keep_time, args=[budget], daemon=True).start()

    def _keep_time(self, budget: Budget) -> None:
        """The thread that records the time spent: a kill may come before the third update."""
        interval = max(1.0, budget.seconds / NUM_CLOCK_CHECKS)
        while not self.ended.wait(interval):
            budget.keep(budget.spent())

    def check_no_other_run(self) -> None:
        """Raises: CheckpointError if another run saved here. Locks fail on some network disks."""
        for path in list_states(self.folder, self.name):
            if path not in self.own_states:
                raise CheckpointError(
                    f"{path} was saved by another run in the same folder: stopped. "
                    f"Choose another --checkpoint_dir for one of them."
                )

    def add_state(self, path: Path) -> None:
        """Record a state that this run has saved, and offer it to the mirror."""
        self.own_states.add(path)
        for abandoned in self.folder.glob(f"{self.name}_resume_*.abandoned"):
            remove(abandoned)
        self.write(step=update_of(path))
        if self.mirror is not None:
            self.mirror.offer(path)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.ended.set()
        code = 0 if error is None else exit_status_of(error)
        if self.mirror is not None and code in (0, 75):
            with contextlib.suppress(Interrupted):  # a signal while waiting
                self.mirror.finish(MIRROR_SECONDS if code == 0 else 10)
        last = read_run_state(self.folder)
        if last.get("pid") == os.getpid() and last.get("status") == "running":
            status = {0: "complete", 75: "interrupted"}.get(code, "failed")
            self.tell(status=status, code=code, reason=str(error or ""))  # or the exit status tells
        for descriptor in self.locks:
            os.close(descriptor)


def read_run_state(folder: str | Path) -> dict:
    """The content of ``run_state.json``; empty if it is missing, or not what is written there."""
    with contextlib.suppress(OSError, ValueError):
        content = read_json(Path(folder) / RUN_STATE)
        if all(type(content.get(name)) is kind for name, kind in FORM.items()):
            return content
    return {}


def record_lost_rank(folder: str, kind: object, error: BaseException | None, trace: object) -> None:
    """Record the loss of a rank. Called on every rank, since rank 0 may be the lost one."""
    content = read_run_state(folder)
    if isinstance(error, RankError) and content.get("status") == "running":
        content |= {"status": "failed", "code": error.exit_status, "reason": str(error)}
        with contextlib.suppress(OSError):
            write_atomically(Path(folder) / RUN_STATE, json.dumps(content, indent=1).encode())


def usable(path: Path) -> None:
    """Raises: CheckpointError if a file is no state."""
    check_layout(read_state(path))


def state_to_anneal(args: TrainConfig, anneal_from: str) -> dict:
    """The state that --anneal_from names, on every rank, with the --epochs and --decay_ratio given.

    Raises: CheckpointError if it cannot be used."""
    path, flag = Path(anneal_from), f"--anneal_from {anneal_from}"

    def read() -> dict:
        if not is_state(path.name) or not path.exists():
            raise CheckpointError(
                f"{flag} is not a state. Expected checkpoints/NAME_resume_….safetensors"
            )
        return read_state(path)

    state = on_main_process(read)
    check_layout(state)
    state["settings"] |= {name: getattr(args, name) for name in ("decay_ratio", "epochs")}
    return state


def find_state(folder: RunFolder) -> dict | None:
    """The state to resume from, on every rank, or None if there is none and the run is new.

    Raises: CheckpointError, MirrorError if there is or may be a state that cannot be used."""

    def load(update: int | None) -> dict | None:
        on_main_process(partial(folder.fetch, update))
        return newest_for_all(folder.folder, folder.name, update, check_layout)

    args, state = folder.args, load(None)
    rollback = [args.resume_step, args.skip_steps]
    if args.resume_step is not None and (state is None or rollback not in state["rollbacks"]):
        state = load(args.resume_step)
    if state is None:
        log("no state found: starting a new run")
        return None
    if rollback != [None, None] and rollback not in state["rollbacks"]:
        state["rollbacks"].append(rollback)  # so that the same command returns there only once
    log(f"resuming after update {state['step']:,}")
    return state
