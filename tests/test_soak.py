"""Mixed faults at random, on one to four ranks: in the end the run that nothing disturbed.

    SOAK_SECONDS=3600 pytest -s -m slow tests/test_soak.py        # an hour; SOAK_SEED=7 to repeat

Each life of a run has faults from the lists below, in its processes and in its files, until it is
complete. Without SOAK_SECONDS it takes a minute."""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests import launched
from tests.running import tiny_flags, write_corpus
from tests.test_kills import assert_equal_runs, finish, settings, whole  # noqa: F401
from tests.test_reading import STRANGE, newer_than
from trainer.checkpoint import is_good, list_states
from trainer.guard.run_folder import RUN_STATE

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
STATUSES = {0, 6, 8, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP}  # of a life
NAME = "pretrain_32"
pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------ while it runs


def kill_one(dice: random.Random, processes: list[BaseProcess]) -> None:
    dice.choice(processes).kill()


def kill_all(dice: random.Random, processes: list[BaseProcess]) -> None:
    launched.kill_all(processes)


def stop_one(dice: random.Random, processes: list[BaseProcess]) -> None:
    number = dice.choice([signal.SIGTERM, signal.SIGHUP])
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(dice.choice(processes).pid, number)


def stop_all_twice(dice: random.Random, processes: list[BaseProcess]) -> None:
    for _ in range(2):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        time.sleep(dice.uniform(0, 0.2))


def nothing(dice: random.Random, processes: list[BaseProcess]) -> None:
    """It goes on to its end, or to a fault of its own."""


DURING = [kill_one, kill_all, stop_one, stop_all_twice, nothing]


def own_fault(dice: random.Random) -> list[tuple]:
    """A fault inside the first rank's saves, or none."""
    number = dice.randint(0, 60)
    kill = ("kill_at_operation", {"number": number})
    fail = ("fail_at_operation", {"number": number, "code": dice.choice(["ENOSPC", "EIO"])})
    return dice.choice([[], [], [kill], [fail]])


# ---------------------------------------------------------------------------- between two lives


def states(folder: Path) -> list[Path]:
    return list_states(folder / "checkpoints", NAME)


def damage_newest(dice: random.Random, folder: Path) -> None:
    """Unless it is the only good one."""
    good = [path for path in states(folder) if is_good(path)]
    if len(good) > 1:
        data = bytearray(good[0].read_bytes())
        place = dice.randrange(len(data))
        data[place] ^= 1 << dice.randrange(8)
        good[0].write_bytes(data[: dice.choice([place, len(data)])])


def delete_newest(dice: random.Random, folder: Path) -> None:
    good = [path for path in states(folder) if is_good(path)]
    if len(good) > 1:
        good[0].unlink()


def strange_newest(dice: random.Random, folder: Path) -> None:
    if (found := states(folder)) and not newer_than(found[0]).exists():
        STRANGE[dice.choice(["pipe", "dangling link", "endless", "sparse"])](newer_than(found[0]))


def damage_json(dice: random.Random, folder: Path) -> None:
    place = dice.choice([f"checkpoints/{RUN_STATE}", f"out/{NAME}.json"])
    if (folder / place).exists():
        (folder / place).write_text(dice.choice(["", "[]", "null", "[" * 10**5, '{"step": "x"}']))


def damage_metrics(dice: random.Random, folder: Path) -> None:
    path = folder / "out" / f"{NAME}_metrics.jsonl"
    if path.exists():
        path.write_bytes(path.read_bytes()[: dice.randint(0, 5000)] + b"\xff{")


def damage_cache(dice: random.Random, folder: Path) -> None:
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    if files:
        path = dice.choice(files)
        path.write_bytes(path.read_bytes()[: dice.randint(0, 100)])


BETWEEN: list[Callable] = [
    damage_newest,
    delete_newest,
    strange_newest,
    damage_json,
    damage_metrics,
    damage_cache,
]


def test_after_any_mixture_of_faults_it_is_the_run_that_nothing_disturbed(
    whole: dict,  # noqa: F811
    tmp_path: Path,
) -> None:
    seed = int(os.environ.get("SOAK_SEED", str(random.SystemRandom().randrange(10**6))))
    print(f"\nSOAK_SEED={seed}", flush=True)
    dice, since, counts = random.Random(seed), time.monotonic(), Counter()
    while time.monotonic() - since < SECONDS:
        num_ranks = dice.choice([1, 1, 2, 2, 4])
        reference, seconds = whole[num_ranks]
        folder = tmp_path / str(counts["runs"])
        folder.mkdir()
        write_corpus(folder / "corpus.jsonl")
        words = tiny_flags(folder, **settings(num_ranks), timeout=20)
        for _ in range(dice.randint(1, 6)):
            faults, during = own_fault(dice), dice.choice(DURING)
            log = folder / "log"
            log.unlink(missing_ok=True)
            processes = launched.start_trainers(words, log, num_ranks, faults)
            time.sleep(dice.uniform(0, 1.2 * seconds))
            during(dice, processes)
            statuses = launched.wait_for_all(processes)
            text = log.read_text() if log.exists() else ""
            assert set(statuses) <= STATUSES and "\nTraceback" not in f"\n{text}", (statuses, text)
            counts["lives"] += 1
            counts[during.__name__] += 1
            for name, _ in faults:
                counts[name] += 1
            for change in dice.sample(BETWEEN, dice.randint(0, 2)):
                change(dice, folder)
                counts[change.__name__] += 1
        finish(folder, num_ranks)
        for path in states(folder):  # beside a run that was complete already
            if not is_good(path):
                path.unlink()
        assert_equal_runs(folder, reference, at_least=1)  # a full disk takes the other
        counts["runs"] += 1
        print(f"{dict(counts)} in {time.monotonic() - since:.0f} s", flush=True)
