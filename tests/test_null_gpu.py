"""CUDA's host code without a card: the real program, at its real sizes, on a null GPU.

The environment has to be prepared, once, with about 3 GB of downloads; without it these tests are
skipped:

    python tests/null_gpu/build.py FOLDER
    NULL_GPU_FOLDER=FOLDER pytest -m slow tests/test_null_gpu.py

What shows here: exceptions, launches that no card takes, waits for the device, what is compiled,
how much memory is asked for. What kernels compute does not.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import ROOT, write_jsonl
from tests.null_gpu.build import environment

FOLDER = os.environ.get("NULL_GPU_FOLDER", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="NULL_GPU_FOLDER is not set: see this file's text"),
]


GRAPHS_AROUND = 18  # eight parts of a layer and the loss, for training and for evaluation


class Case(NamedTuple):
    """A run of the trainer, and what may be asked of an update of one pass."""

    card: str
    flags: str
    most_launches: int
    most_waits: int = 0
    num_ranks: int = 1


# At most a tenth more launches than were counted on 2026-11-26 with torch 2.11.0+cu130.
CASES = {
    "dense": Case("h100", "", 580),
    "dense, eager": Case("h100", "--use_compile 0", 1_170),
    "dense, float16": Case("h100", "--dtype float16", 590),
    "dense, Muon": Case("h100", "--optimizer muon", 839),
    "dense, Muon, in turn": Case("h100", "--optimizer muon --muon_period 2 --muon_beta2 0.95", 818),
    "experts": Case("h100", "--preset moe", 850),
    "experts, Muon": Case("h100", "--preset moe --optimizer muon", 1_110),
    "dense, rows from loader processes": Case("h100", "--num_workers 2", 580),
    "dense, dropout": Case("4090", "--dropout 0.1 --use_compile 0", 1_200),
    "dense, 4090": Case("4090", "", 580),
    # Below compute capability 9, torch's grouped product asks for the sizes: 48 copies and waits.
    "experts, 4090, eager": Case("4090", "--preset moe --use_compile 0", 1_850, most_waits=96),
    "T4": Case("t4", "--use_compile 0", 1_190),
    "two ranks": Case("h100", "", 790, num_ranks=2),
    "two ranks, experts, eager": Case("h100", "--preset moe --use_compile 0", 2_000, num_ranks=2),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 150 rows of 512 tokens, of very uneven documents."""
    texts = (f"{i} " + "one more word of it " * (i * i % 97 + 1) for i in range(300))
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


def start(
    folder: Path, card: str, program: str, words: list[str], num_ranks: int = 1
) -> tuple[str, dict]:
    """Run a program on a null GPU to its end. Returns: what it printed, and the report."""
    env = environment(Path(FOLDER), card) | {"NULL_GPU_COUNT": str(num_ranks)}
    command = [f"{FOLDER}/venv/bin/python"]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command.append(str(num_ranks))
    report = folder / "report.json"
    done = subprocess.run(
        [*command, "-m", "tests.null_gpu.run", str(report), program, *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "no card takes" not in done.stderr, done.stderr[-2000:]
    return done.stdout, json.loads(report.read_text())


def flags(folder: Path, corpus: Path, more: str = "") -> list[str]:
    """Of a run of a few updates of one pass each."""
    words = f"--batch_size 8 --accumulation_steps 4 {more}"
    places = {"data_path": corpus, "save_dir": folder / "out"}
    places |= {"checkpoint_dir": folder / "checkpoints", "cache_dir": corpus.parent / "cache"}
    words += "".join(f" --{name} {path}" for name, path in places.items())
    return [*words.split(), "--strict_fast_path", "1"]


@pytest.mark.parametrize("name", CASES)
def test_a_run_comes_to_its_end_and_asks_little_of_the_device(
    tmp_path: Path, corpus: Path, name: str
) -> None:
    case = CASES[name]
    words = flags(tmp_path, corpus, case.flags)
    output, report = start(tmp_path, case.card, "train_pretrain", words, case.num_ranks)
    assert "1 passes per update" in output and "The capital of France is →" in output
    assert next((tmp_path / "out").glob("*.pth"), None)
    shutil.rmtree(tmp_path / "checkpoints")  # gigabytes
    _, *updates = report["updates"]
    assert len(updates) >= 2
    assert max(update["launches"] for update in updates) <= case.most_launches
    assert max(sum(update["waits"].values()) for update in updates) <= case.most_waits
    assert not report["graph_breaks"]
    compiled = "use_compile 0" not in case.flags
    assert report["graphs"] == (4 if compiled else 0), "layer and loss, training and evaluation"
    exchanges = [update["all_reduces"] for update in updates]
    assert min(exchanges) > 1 if case.num_ranks > 1 else not any(exchanges)


def test_experts_without_a_kernel_are_compiled_around_their_product(
    tmp_path: Path, corpus: Path
) -> None:
    """It asks for sizes, and a graph would hold for these only."""
    words = flags(tmp_path, corpus, "--preset moe --dtype float16")
    _, report = start(tmp_path, "h100", "train_pretrain", words)
    shutil.rmtree(tmp_path / "checkpoints")
    assert len(report["updates"]) > 2
    assert report["graphs"] == GRAPHS_AROUND


def test_resume_dry_run_and_eval(tmp_path: Path, corpus: Path) -> None:
    saving = "--use_compile 0 --save_interval 2 --keep_states 9"
    start(tmp_path, "h100", "train_pretrain", flags(tmp_path, corpus, saving))
    again = flags(tmp_path, corpus, f"{saving} --from_resume 1 --resume_step 2")
    output, report = start(tmp_path, "h100", "train_pretrain", again)
    assert "resuming after update 2" in output and "held out: " in output
    assert report["updates"]
    output, _ = start(
        tmp_path, "h100", "train_pretrain", flags(tmp_path / "dry", corpus, "--dry_run 1")
    )
    assert re.search(r"dry run: .* s per update", output)
    words = ["--save_dir", str(tmp_path / "out"), "--prompt", "Once upon a time"]
    output, _ = start(tmp_path, "h100", "eval_llm", words)
    assert "Once upon a time" in output


def test_a_batch_of_more_documents_than_a_grid_takes_goes_by_mask(tmp_path: Path) -> None:
    """65,536 and more of them: CUDA counts no further in that dimension."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["a"] * 200_000)
    few = "--use_compile 0 --max_seq_len 256 --micro_batch_size 1024 --hidden_size 128"
    words = flags(tmp_path, corpus, few + " --batch_size 1024 --accumulation_steps 1")
    start(tmp_path, "h100", "train_pretrain", [*words, "--num_hidden_layers", "1"])


@pytest.mark.parametrize(("gib", "rows"), [("8", 16), ("12", 32), ("16", 32), ("24", 64)])
def test_cards_of_little_memory_take_fewer_rows(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, gib: str, rows: int
) -> None:
    monkeypatch.setenv("NULL_GPU_GIB", gib)
    words = flags(tmp_path, corpus, "--use_compile 0 --batch_size 32 --accumulation_steps 8")
    output, report = start(tmp_path, "3090", "train_pretrain", [*words, "--dry_run", "1"])
    assert f"pass: {rows} rows, " in output
    assert report["peak_bytes"] < float(gib) * 2**30
