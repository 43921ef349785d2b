"""Mutated real files, through everything that reads what others may have written.

    FUZZ_SECONDS=600 pytest -s -m slow tests/test_fuzz.py        # FUZZ_SEED=7 to repeat

Whatever is in a file: it is read, or refused with an exit status of its own, within seconds and
within a limit of memory that the system enforces. Without FUZZ_SECONDS it takes a minute."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dataset.records import DataError
from dataset.token_cache import build_token_cache
from model.model_minimind import MiniMindForCausalLM
from scripts import export
from tests.helpers import ROOT, digest, shipped_tokenizer
from tests.running import run_command, train_in_process
from trainer.checkpoint import list_states, newest_state
from trainer.errors import CheckpointError, SettingsError
from trainer.guard.check_state import check_layout
from trainer.guard.mirror import Mirror, MirrorError, fetch_newest
from trainer.guard.run_folder import RUN_STATE, read_run_state, usable
from trainer.preferences import read_reference, write_reference
from trainer.weights import load_tokenizer, load_weights, read_config, read_weights

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
MOST_SECONDS = 20  # for one file
MORE_MEMORY = 2**31  # bytes of address space beside what the process has when it begins
REFUSED = (CheckpointError, SettingsError, DataError, MirrorError, OSError)
VALUES = [
    None,
    True,
    -1,
    0,
    10**10,
    10**400,
    1e308,
    float("nan"),
    "x",
    "",
    [],
    {},
    "\ud800",
    "[" * 99,
]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """With a few bytes changed, cut, repeated or moved."""
    found = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        place = dice.randrange(len(found) + 1)
        length = dice.choice([1, 2, 8, 100])
        kind = dice.randrange(5)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            found[place : place + length] = dice.randbytes(length)
        elif kind == 2:
            del found[place : place + length]
        elif kind == 3:
            found[place:place] = found[: length * 10]
        elif kind == 4 and dice.random() < 0.2:
            del found[place:]
    return bytes(found)


def with_other_value(text: bytes, dice: random.Random) -> bytes:
    """JSON with one of its values replaced, at any depth."""
    content = part = json.loads(text)
    while True:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        if not keys:
            return text
        key = dice.choice(list(keys)[:50])
        if isinstance(part[key], dict | list) and part[key] and dice.random() < 0.7:
            part = part[key]
            continue
        part[key] = dice.choice(VALUES)
        return json.dumps(content).encode("utf-8", "surrogatepass")


def change(path: Path, dice: random.Random) -> None:
    """Mutate a file in place."""
    data = path.read_bytes()
    is_json = path.suffix == ".json" and dice.random() < 0.7
    path.write_bytes(with_other_value(data, dice) if is_json else mutated(data, dice))


def state(folder: Path, dice: random.Random) -> None:
    (path,) = list_states(folder / "checkpoints", "pretrain_32")[:1]
    data = mutated(path.read_bytes(), dice)
    path.unlink()
    stem = path.stem.rsplit("_", 1)[0]
    path.with_name(f"{stem}_{digest(data)}.safetensors").write_bytes(data)
    newest_state(folder / "checkpoints", "pretrain_32", None, check_layout)


def weights(folder: Path, dice: random.Random) -> None:
    path = folder / "out" / "pretrain_32.pth"
    change(dice.choice([path, path.with_suffix(".json")]), dice)
    model = MiniMindForCausalLM(read_config(path, read_weights(path)))
    load_weights(model, path, "--weight")


def run_state(folder: Path, dice: random.Random) -> None:
    change(folder / "checkpoints" / RUN_STATE, dice)
    found = read_run_state(folder / "checkpoints")
    assert found == {} or isinstance(found["step"], int)


def tokenizer(folder: Path, dice: random.Random) -> None:
    names = ["tokenizer.json", "tokenizer_config.json"]
    change(folder / "tokenizer" / dice.choice(names), dice)
    load_tokenizer(str(folder / "tokenizer"))


def cache(folder: Path, dice: random.Random) -> None:
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    change(dice.choice(files), dice)
    build_token_cache(str(folder / "corpus.jsonl"), shipped_tokenizer(), folder / "cache")


def mirror(folder: Path, dice: random.Random) -> None:
    (path, *_) = list_states(folder / "checkpoints", "pretrain_32")
    change(path, dice)
    one = Mirror(str(folder / "checkpoints"), "pretrain_32", print)
    try:
        fetch_newest(one, folder / "here", -1, usable)
    finally:
        one.finish(0)


def imported(folder: Path, dice: random.Random) -> None:
    names = ["config.json", "config.json", "model.safetensors", "generation_config.json"]
    change(folder / "hf" / dice.choice(names), dice)
    export.read_hf(folder / "hf")


def reference(folder: Path, dice: random.Random) -> None:
    change(folder / "reference", dice)
    read_reference(folder / "reference")


READERS: list[Callable] = [
    *(state, weights, run_state, tokenizer, cache, mirror, imported, reference)
]


def make(folder: Path) -> None:
    """The real files that are mutated."""
    train_in_process(folder, epochs=1)
    shutil.copytree(
        ROOT / "model", folder / "tokenizer", ignore=shutil.ignore_patterns("*.py", "_*")
    )
    weight = ["--weight", str(folder / "out" / "pretrain_32.pth")]
    assert export.main(["--to", "hf", *weight, "--output", str(folder / "hf")]) == 0
    write_reference(folder / "reference", torch.randn(60, 2))


def too_long(*args: object) -> None:
    raise TimeoutError(f"more than {MOST_SECONDS} s")


def fuzz(folder: Path, seed: int, seconds: float) -> None:
    """Mutate and read, until the time is over; prints the counts."""
    dice, since, counts = random.Random(seed), time.monotonic(), Counter()
    make(folder / "real")
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + MORE_MEMORY, here + MORE_MEMORY))
    signal.signal(signal.SIGALRM, too_long)
    while time.monotonic() - since < seconds:
        read = dice.choice(READERS)
        copy = folder / "copy"
        shutil.copytree(folder / "real", copy)
        signal.alarm(MOST_SECONDS)
        try:
            read(copy, dice)
            counts[f"{read.__name__} read"] += 1
        except REFUSED as error:
            assert len(str(error)) < 2000, str(error)
            counts[f"{read.__name__} refused"] += 1
        except BaseException as error:
            kept = folder / "failed"
            shutil.copytree(copy, kept, dirs_exist_ok=True)
            print(f"{read.__name__}: {type(error).__name__}: {str(error)[:300]}; see {kept}")
            raise
        finally:
            signal.alarm(0)
        shutil.rmtree(copy)
    print("counts", json.dumps(counts, sort_keys=True))


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    seed = int(os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(10**6))))
    print(f"\nFUZZ_SEED={seed}", flush=True)
    call = f"fuzz(Path({str(tmp_path)!r}), {seed}, {SECONDS})"
    program = f"from pathlib import Path; from tests.test_fuzz import fuzz; {call}"
    done = run_command([sys.executable, "-c", program], timeout=SECONDS + 200)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    counts = json.loads(done.stdout.partition("counts ")[2])
    print(counts)
    assert {name.split()[0] for name in counts} == {read.__name__ for read in READERS}
