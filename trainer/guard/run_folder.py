"""One run a folder, and ``run_state.json``: what the run does, or how it ended.

torchrun's exit status is 1 whatever a rank returned; a supervisor reads the file instead:

    {"status": "running" | "interrupted" | "complete" | "failed", "code": the exit status or null,
     "run": "pretrain_768", "step": updates saved, "reason": "...", "pid": ..., "host": ...,
     "since": "2026-11-22 10:02:11", "bad_records": lines of the data passed over,
     "seconds_spent": of --max_minutes, by all starts}
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

from model.model_minimind import MiniMindConfig
from trainer.checkpoint import (
    checkpoint_name,
    digest_of_file,
    is_state,
    list_states,
    newest_for_all,
    read_state,
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
from trainer.plan import Budget
from trainer.weights import weights_path

FILE = "run_state.json"
LOCK_PATIENCE = 1.0  # seconds in which a lock may come free: that of a process being killed
MIRROR_PATIENCE = 600.0  # seconds for the last copy to arrive


class RunFolder:
    """A context: the run holds its folders inside, and how it ends is written down.

    Only the main process enters it. The locks are the kernel's, by process: no kill leaves one
    behind, and none passes to a child.

    Raises: SettingsError if another run holds a folder, OSError if one cannot be written to."""

    def __init__(self, args: TrainConfig, config: MiniMindConfig) -> None:
        self.args, self.name = args, checkpoint_name(args.save_weight, config)
        self.folder, self.save_dir = Path(args.checkpoint_dir), Path(args.save_dir)
        self.weights = weights_path(args.save_dir, args.save_weight, config)
        self.path = self.folder / FILE
        self.locks: list[int] = []
        self.known: set[Path] = set()  # states of this run
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
        }

    def __enter__(self) -> "RunFolder":
        for flag, folder, lock in (
            ("--checkpoint_dir", self.folder, ".lock"),
            ("--save_dir", self.save_dir, f".{self.name}.lock"),
        ):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock(flag, folder / lock)
                probe = write_atomically(folder / f"{self.name}.probe", b"")
                probe.unlink()
            except OSError as error:
                raise OSError(f"cannot write to {flag} {folder}: {error.strerror}") from None
        last = read_run_state(self.folder)
        spent = last.get("seconds_spent")
        if last.get("run") == self.name and isinstance(spent, float) and 0 < spent < math.inf:
            self.content["seconds_spent"] = spent
        if last.get("status") == "running":
            log(
                f"note: the last run here ended without a word (killed, or out of memory) some "
                f"time after update {last.get('step', 0):,}"
            )
        parts = [
            *remove_partial_files(self.folder, self.name),
            *remove_partial_files(self.folder, "run_state"),
            *remove_partial_files(self.save_dir, self.name),
        ]
        for part in parts:
            log(f"note: removed {part.name}, which a killed run left half-written")
        if last.get("status") != "complete":  # a complete run that is started again stays as it is
            self.write()
        return self

    def _lock(self, flag: str, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        since = time.monotonic()
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self.locks.append(descriptor)
            except (BlockingIOError, PermissionError):
                if time.monotonic() - since > LOCK_PATIENCE:
                    os.close(descriptor)
                    break
            time.sleep(0.05)
        last, owner = read_run_state(self.folder), "another run"
        if last.get("status") == "running":
            owner = f"{last['run']}, pid {last['pid']} on {last['host']} since {last['since']}"
        raise SettingsError(f"{flag} {path.parent} is in use by {owner}. Give another {flag}.")

    def write(self, **changes: object) -> None:
        """Replace ``run_state.json``."""
        self.content |= changes
        text = json.dumps(self.content, indent=1, ensure_ascii=False)
        write_atomically(self.path, text.encode())

    def files(self) -> list[Path]:
        """What an earlier run of this name left: states, newest first, and weights."""
        weights = (self.weights, self.weights.with_suffix(".json"))
        states = list_states(self.folder, self.name)
        return [*states, *(path for path in weights if path.exists())]

    def refuse_to_overwrite(self) -> None:
        """Raises: CheckpointError if a new run's saves would replace another run's files."""
        taken: list = self.files()
        if self.mirror is not None:
            with contextlib.suppress(MirrorError):  # gone: saving there will warn
                taken += [f"{self.mirror.safe_url}/{name}" for name in self.mirror.states()]
        if taken and not self.args.overwrite:
            raise CheckpointError(
                f"{taken[0]} belongs to an earlier run. --from_resume 1 resumes it, "
                f"--save_weight NAME starts one beside it, --overwrite 1 deletes it."
            )

    def delete_run(self) -> None:
        """--overwrite 1: forget the earlier run of this name."""
        for path in self.files():
            path.unlink()
        if self.mirror is not None and self.args.overwrite:
            self.mirror.clear()

    def fetch(self, update: int | None) -> None:
        """Bring a state from the mirror if it has a newer one than there is here, or the one of
        ``update`` if that is not here. Raises: MirrorError, CheckpointError if none is here."""
        if self.mirror is None:
            return
        whole = [
            update_of(path)
            for path in list_states(self.folder, self.name)
            if digest_of_file(path) in path.name
        ]
        try:
            self.mirror.owns(self.mirror.states())
            if update is None:
                found, complaints = fetch_newest(self.mirror, self.folder, max(whole, default=-1))
                for complaint in complaints:
                    log(f"warning: {complaint}")
                if found:
                    log(f"fetched {found.name} from the mirror")
            elif update not in whole:
                for name in self.mirror.states():
                    if update_of(name) == update:
                        self.mirror.fetch(name, self.folder)
        except MirrorError as error:
            if not whole:
                raise
            log(f"warning: {error}")

    def set_aside(self, update: int) -> None:
        """The run goes back to the state of ``update``: those after it are no longer its own.

        They are deleted once the first state of the new branch is safe."""
        for path in list_states(self.folder, self.name):
            if update_of(path) > update:
                path.rename(path.with_suffix(".abandoned"))

    def seconds_spent(self, budget: Budget, resumed: bool) -> None:
        """Let the budget know what earlier starts spent, to their last look at the clock, and keep
        what this one spends."""
        if resumed:
            budget.spent_before = max(budget.spent_before, self.content["seconds_spent"])

        def keep(seconds: float) -> None:
            with contextlib.suppress(OSError):  # a full disk: only the count would suffer
                self.write(seconds_spent=round(seconds, 3))

        budget.keep = keep

    def begin(self, step: int, num_bad_records: int) -> None:
        """Training begins, after so many updates."""
        self.known = set(list_states(self.folder, self.name))
        if self.mirror is not None:
            self.mirror.owns(path.name for path in self.known)
        self.write(step=step, bad_records=num_bad_records)

    def check_no_other_run(self) -> None:
        """Raises: CheckpointError if another run saved here: on some network disks locks fail."""
        for path in list_states(self.folder, self.name):
            if path not in self.known:
                raise CheckpointError(
                    f"{path} is of another run that writes here, too: stopped. "
                    f"Give one of them another --checkpoint_dir."
                )

    def saved(self, path: Path) -> None:
        """A state of this run was written."""
        self.known.add(path)
        for abandoned in self.folder.glob(f"{self.name}_resume_*.abandoned"):
            abandoned.unlink()
        self.write(step=update_of(path))
        if self.mirror is not None:
            self.mirror.offer(path)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code = 0 if error is None else exit_status_of(error)
        if self.mirror is not None and code in (0, 75):
            with contextlib.suppress(Interrupted):  # by a signal while it waits
                self.mirror.finish(MIRROR_PATIENCE if code == 0 else 10)
        last = read_run_state(self.folder)
        if last.get("pid") == os.getpid() and last.get("status") == "running":
            status = {0: "complete", 75: "interrupted"}.get(code, "failed")
            with contextlib.suppress(OSError):  # a full disk, perhaps: the exit status remains
                self.write(status=status, code=code, reason=str(error or ""))
        for descriptor in self.locks:
            os.close(descriptor)


def read_run_state(folder: str | Path) -> dict:
    """What ``run_state.json`` says, empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def record_lost_rank(folder: str, kind: object, error: BaseException | None, trace: object) -> None:
    """Write down, from any rank, that another one is lost: the first may be the lost one."""
    content = read_run_state(folder)
    if isinstance(error, RankError) and content.get("status") == "running":
        content |= {"status": "failed", "code": error.exit_status, "reason": str(error)}
        with contextlib.suppress(OSError):
            write_atomically(Path(folder) / FILE, json.dumps(content, indent=1).encode())


def state_to_anneal(args: TrainConfig, anneal_from: str) -> dict:
    """The state that --anneal_from names, on every rank; how long its run was to be is forgotten.

    Raises: CheckpointError if it cannot be used."""
    path, flag = Path(anneal_from), f"--anneal_from {anneal_from}"

    def read() -> dict:
        if not is_state(path.name) or not path.exists():
            raise CheckpointError(
                f"{flag}: no state, such as checkpoints/NAME_resume_….safetensors, there"
            )
        return read_state(path)

    state = on_main_process(read)
    check_layout(state)
    state["settings"] |= {name: getattr(args, name) for name in ("decay_ratio", "epochs")}
    return state


def find_state(args: TrainConfig, config: MiniMindConfig, folder: RunFolder) -> dict | None:
    """The state to resume from, on every rank; None if there is none and the run is a new one.

    Raises: CheckpointError, MirrorError if there may be one that cannot be used."""

    def load(update: int | None = None) -> dict | None:
        found = newest_for_all(folder.folder, folder.name, update)
        if found is not None:
            check_layout(found)
        return found

    on_main_process(partial(folder.fetch, None))
    state = load()
    rollback = [args.resume_step, args.skip_steps]
    if args.resume_step is not None and (state is None or rollback not in state["rollbacks"]):
        on_main_process(partial(folder.fetch, args.resume_step))
        state = load(update=args.resume_step)
        on_main_process(partial(folder.set_aside, args.resume_step))
    if state is None:
        log("no state yet: a new run")
        return None
    if rollback != [None, None] and rollback not in state["rollbacks"]:
        state["rollbacks"].append(rollback)  # so that the same command does not go back twice
    log(f"resuming after update {state['step']:,}")
    return state
