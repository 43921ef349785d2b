"""Training runs on tiny models: started here or in new processes, killed, and compared.

``train_in_process`` calls the program in this process; ``run_command``, ``train_on_ranks`` and
``train_and_kill`` start new ones. Processes with injected faults are in launched.py."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import eval_llm
import train_pretrain
from tests.helpers import ROOT, write_jsonl
from trainer.checkpoint import list_states, read_state
from trainer.step_times import PARTS

TINY_FLAGS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_seq_len": 32,
    "batch_size": 2,
    "accumulation_steps": 4,
    "epochs": 2,
    "learning_rate": 1e-3,
    "log_interval": 1,
    "save_interval": 5,
    "eval_interval": 1000,
    "heldout_fraction": 0.1,
    "dtype": "float32",
    "device": "cpu",
}


TIMED = (
    "tokens_per_second",
    "pairs_per_second",
    "eta_minutes",
    "minutes_spent",
    "mfu",
)  # differ between runs
TIMED += tuple(f"share_{part}" for part in PARTS)


def short_documents(num: int = 80) -> list[str]:
    """Distinct short documents of various lengths."""
    return [
        f"Document {i}: " + " ".join(f"word{i * j % 17}" for j in range(i % 19 + 1))
        for i in range(num)
    ]


def fact_documents() -> list[str]:
    """The built-in prompts with their answers, which a tiny model can memorize."""
    return [f"{prompt} {answer}." for prompt, answer in eval_llm.PROMPTS.items()]


MEMORIZE_FLAGS = (  # memorizes ``fact_documents`` within seconds
    "--hidden_size 64 --num_hidden_layers 2 --num_attention_heads 4 --num_key_value_heads 2 "
    "--intermediate_size 128 --max_seq_len 64 --batch_size 2 --accumulation_steps 1 --epochs 8 "
    "--learning_rate 5e-3 --heldout_fraction 0.02 --device cpu --dtype float32 "
)


def write_corpus(path: Path, documents: list[str] | None = None) -> Path:
    """Write JSONL of ``documents``, by default ``short_documents()``. Returns: ``path``."""
    return write_jsonl(path, documents or short_documents())


def tiny_flags(folder: Path, **changes: object) -> list[str]:
    """TINY_FLAGS with ``changes`` as command-line arguments; all files are inside ``folder``.

    Writes the corpus if there is none."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_corpus(corpus)
    places = {
        "data_path": corpus,
        "save_dir": folder / "out",
        "checkpoint_dir": folder / "checkpoints",
        "cache_dir": folder / "cache",
    }
    chosen = TINY_FLAGS | places | changes
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def training_command(
    arguments: list[str], num_ranks: int = 1, program: str = "train_pretrain.py"
) -> list[str]:
    """The command line that trains on ``num_ranks`` ranks."""
    if num_ranks == 1:
        return [sys.executable, program, *arguments]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return [*run, str(num_ranks), program, *arguments]


def run_command(words: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a new process, in the root of the repository."""
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def train_in_process(folder: Path, **changes: object) -> str:
    """Train to the end in this process, which must succeed. Returns: what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert train_pretrain.main(tiny_flags(folder, **changes)) == 0
    return output.getvalue()


def train_on_ranks(folder: Path, num_ranks: int, **changes: object) -> str:
    """Train to the end in new processes, which must succeed. Returns: what they printed."""
    done = run_command(training_command(tiny_flags(folder, **changes), num_ranks))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_metrics(folder: Path) -> list[dict]:
    """The complete records of the metrics file of a run in ``folder``; none if there is no file."""
    found = list((folder / "out").glob("*_metrics.jsonl"))
    lines = found[0].read_text(encoding="utf-8").splitlines(keepends=True) if found else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def without_times(found: list[dict]) -> list[dict]:
    """Records without times and what is computed from them, which differ between runs."""
    return [{k: v for k, v in record.items() if k not in TIMED} for record in found]


def metrics_without_times(folder: Path) -> list[dict]:
    """As ``read_metrics``, without times."""
    return without_times(read_metrics(folder))


def newest_state(folder: Path, name: str = "pretrain_32") -> dict:
    """The newest state of a run in ``folder``, without times."""
    state = read_state(list_states(folder / "checkpoints", name)[0])
    return state | {"records": without_times(state["records"])}


def assert_same(a: object, b: object, where: str = "state") -> None:
    """Assert that nested structures of tensors and values are equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def files_with_times(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The time of modification and the bytes of each file, by path."""
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def mark_slow_except_every(num: int, cases: Iterable) -> list:
    """Parameters of a test, of which all but every ``num``-th are marked slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(case, marks=slow if i % num else []) for i, case in enumerate(cases)]


def descendant_pids(pid: int) -> list[int]:
    """The ids of all descendants of a process, parents first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(c) for c in children] + [d for c in children for d in descendant_pids(int(c))]


def train_and_kill(
    folder: Path,
    step: int,
    num_ranks: int = 1,
    words: list[str] | None = None,
    program: str = "train_pretrain.py",
    **changes: object,
) -> int:
    """Start training in new processes, and SIGKILL a rank once ``step`` is logged.

    Returns: the last step logged."""
    with subprocess.Popen(
        training_command(words or tiny_flags(folder, **changes), num_ranks, program),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not any(record["step"] >= step for record in read_metrics(folder)):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run did not get to this step in time"
            time.sleep(0.01)
        victim = process.pid if num_ranks == 1 else descendant_pids(process.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    return read_metrics(folder)[-1]["step"]
