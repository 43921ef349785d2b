"""train_full_sft.py: the same loop and guarantees, on conversations."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_full_sft
from tests.helpers import ROOT
from tests.running import (
    assert_same,
    metrics_without_times,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
    train_in_process,
)
from tests.test_conversations import some_conversations, write
from trainer.flags import parse_flags

NAME = "full_sft_32"


def sft_flags(folder: Path, **changes: object) -> list[str]:
    """As tiny_flags, on conversations."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "chats.jsonl"
    if not corpus.exists():
        write(corpus, some_conversations(120))
    own = {
        "data_path": corpus,
        "save_weight": "full_sft",
        "max_seq_len": 128,
        "batch_size": 2,
        "accumulation_steps": 2,
        "from_weight": "none",
        "save_interval": 4,
    }
    return tiny_flags(folder, **own | changes)


def fine_tune(folder: Path, **changes: object) -> str:
    """Fine-tune to the end in this process, which must succeed. Returns: what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert train_full_sft.main(sft_flags(folder, **changes)) == 0
    return output.getvalue()


def command(words: list[str], num_ranks: int = 1) -> list[str]:
    if num_ranks == 1:
        return [sys.executable, "train_full_sft.py", *words]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return [*run, str(num_ranks), "train_full_sft.py", *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    fine_tune(folder)
    return folder


def test_the_defaults_are_minimind_s() -> None:
    args = parse_flags([], program=train_full_sft.FULL_SFT)
    found = (args.save_weight, args.from_weight, args.epochs, args.batch_size, args.learning_rate)
    assert found == ("full_sft", "pretrain", 2, 16, 1e-5)
    assert (args.accumulation_steps, args.max_seq_len, args.log_interval) == (1, 768, 100)
    assert args.data_path == ["dataset/sft_t2t_mini.jsonl"] and args.hidden_size == 768
    assert args.wandb_project == "MiniMind-Full-SFT"
    assert len(Path(train_full_sft.__file__).read_text().splitlines()) <= 110


def test_it_learns_and_answers_questions_at_each_evaluation(whole: Path) -> None:
    records = read_metrics(whole)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    (last,) = [record for record in records if "continuations" in record]
    assert "What is the capital of France?" in last["continuations"]
    assert not any("forecast_expected" in record for record in records)
    described = json.loads((whole / "out" / f"{NAME}.json").read_text())
    assert described["run"]["settings"]["program"] == "full_sft"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_resumes_to_the_last_bit(whole: Path, tmp_path: Path, num_ranks: int) -> None:
    changes = {"accumulation_steps": 2 // num_ranks}
    expected = whole
    if num_ranks > 1:
        expected = tmp_path / "whole"
        done = run_command(command(sft_flags(expected, **changes), num_ranks))
        assert done.returncode == 0, done.stderr
    cut = tmp_path / "cut"
    with subprocess.Popen(
        command(sft_flags(cut, **changes), num_ranks),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not any(record["step"] >= 10 for record in read_metrics(cut)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    done = run_command(command([*sft_flags(cut, **changes), "--from_resume", "1"], num_ranks))
    assert done.returncode == 0, done.stderr
    for part in ("model", "optimizer", "rng", "progress"):
        found, wanted = (newest_state(folder, NAME)[part] for folder in (cut, expected))
        assert_same(found, wanted, part)
    assert metrics_without_times(cut) == metrics_without_times(expected)


@pytest.mark.parametrize(("num_ranks", "steps"), [(2, 1), (4, 1)])
def test_any_number_of_ranks_learns_the_same(
    whole: Path, tmp_path: Path, num_ranks: int, steps: int
) -> None:
    changes = {"accumulation_steps": steps, "batch_size": 4 // num_ranks}
    done = run_command(command(sft_flags(tmp_path, **changes), num_ranks))
    assert done.returncode == 0, done.stderr
    pairs = zip(read_metrics(tmp_path), read_metrics(whole), strict=True)
    for found, expected in pairs:
        for key in ("loss", "heldout_loss"):
            assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-4)


def test_it_begins_with_pretrained_weights_of_their_own_architecture(tmp_path: Path) -> None:
    sizes = {"tie_word_embeddings": 0, "num_key_value_heads": 1, "intermediate_size": 40}
    train_in_process(tmp_path, **sizes, epochs=1)
    words = sft_flags(tmp_path, from_weight="pretrain", epochs=1)
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        at = words.index(f"--{name}")
        del words[at : at + 2]  # the description tells them
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert train_full_sft.main(words) == 0
    first, _ = re.findall(r"loss ([\d.]+)", output.getvalue())[:2]
    described = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    assert described["config"]["num_key_value_heads"] == 1
    assert described["config"]["intermediate_size"] == 40
    assert described["config"]["tie_word_embeddings"] is False
    assert float(first) < 8.7


def test_weights_that_are_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_full_sft.main(sft_flags(tmp_path, from_weight="pretrain")) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "pretrain_32.pth: no such file." in error


def test_a_pretraining_run_is_not_continued_as_fine_tuning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine_tune(tmp_path, epochs=1)
    words = sft_flags(tmp_path, from_resume=1, save_weight="full_sft", epochs=1)
    import train_pretrain

    words[words.index("--data_path") + 1] = str(tmp_path / "corpus.jsonl")
    assert train_pretrain.main(words) == 2
    assert "program" in capsys.readouterr().err
