"""What a run says of itself: numbers, file, console, SwanLab."""

import itertools
import json
import re
import sqlite3
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import train_pretrain
from dataset.lm_dataset import PretrainDataset
from model.model_minimind import MiniMindConfig
from tests.helpers import tiny_model
from tests.running import (
    read_metrics,
    run_command,
    short_documents,
    tiny_flags,
    train_and_kill,
    train_in_process,
    write_corpus,
)
from trainer import describe, fast_paths, metrics
from trainer.command_line import parse_flags
from trainer.flags import PRESETS
from trainer.metrics import flops_per_token, peak_flops, restore_file
from trainer.samples import continuations, encode_prompt, repeated_ngrams
from trainer.step_times import MAX_MARKS, StepTimes, bottleneck, shares


def test_operations_per_token_are_those_of_a_hand_count() -> None:
    """Two operations a weight forward and four backward; likewise for what attention sees."""
    config = MiniMindConfig(hidden_size=768, num_hidden_layers=8)
    kv_width, ffn = 4 * 96, 2432
    layer = 768 * (768 + kv_width + kv_width + 768) + 3 * 768 * ffn
    weights = 8 * layer + 6400 * 768
    seen = 512 / 2  # tokens that a token attends to, on average
    attention = 8 * (2 * 2 * 768 * seen)  # scores, and the values they weigh
    norms = 8 * (2 * 768 + 2 * 96) + 768  # counted as weights for simplicity: 0.02 %
    found = flops_per_token(config, weights + norms, 512)
    assert found == pytest.approx(3 * (2 * weights + attention), rel=1e-3)
    assert found == pytest.approx(0.402e9, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_device_s_peak_is_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (teraflops and teraflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None


def test_mfu_is_operations_done_over_those_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 5e9)
    train_in_process(tmp_path, epochs=1, hidden_size=32, max_seq_len=32)
    config = MiniMindConfig(32, 2, num_attention_heads=4, num_key_value_heads=2)
    layers = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * config.intermediate_size + 2 * 32 + 2 * 8)
    operations = 6 * (6400 * 32 + layers + 32) + 3 * 2 * (2 * 2 * 32 * 32 / 2)
    for record in read_metrics(tmp_path):
        if "mfu" in record:
            expected = record["tokens_per_second"] * operations / 5e9
            assert record["mfu"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert "mfu" in read_metrics(tmp_path)[0]


@pytest.mark.parametrize("made_on_device", [False, True])
def test_a_part_of_a_step_that_is_slow_is_named_once_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_on_device: bool
) -> None:
    """Unless the device makes the rows: no loader process would help there."""
    getitems = train_pretrain.PretrainDataset.__getitems__

    def slow(data: object, rows: list[int]) -> object:
        time.sleep(0.1)
        return getitems(data, rows)

    monkeypatch.setattr(train_pretrain.PretrainDataset, "__getitems__", slow)
    if made_on_device:  # as on a GPU; here they stay where they are
        monkeypatch.setattr(fast_paths, "fits_on_device", lambda run, data: True)
    output = train_in_process(tmp_path, epochs=1, accumulation_steps=1)
    assert output.count("% of the time goes to data: try more --num_workers") == (
        not made_on_device
    )
    found = [record for record in read_metrics(tmp_path) if "loss" in record]
    for record in found:
        parts = {k: v for k, v in record.items() if k.startswith("share_")}
        assert sum(parts.values()) == pytest.approx(1, abs=1e-3)
        assert parts["share_data"] > 0.05 and parts["share_forward_backward"] > 0


def test_a_part_within_its_share_is_not_named() -> None:
    assert bottleneck({"data": 0.04, "forward_backward": 0.9, "optimizer": 0.06}) is None
    part, advice = bottleneck({"data": 0.04, "exchange": 0.5, "optimizer": 0.3})
    assert part == "exchange" and "50% " in advice and "--accumulation_steps" in advice


def test_times_of_a_step_are_those_between_its_marks() -> None:
    times = StepTimes(torch.device("cpu"))
    times.marks = [("", 1.0), ("data", 1.5), ("optimizer", 1.75), ("data", 2.75)]
    assert times.read() == {"data": 1.5, "optimizer": 0.25}
    assert times.read() == {}
    assert shares({"optimizer": 1.0, "data": 3.0}) == {"data": 0.75, "optimizer": 0.25}


def test_times_that_no_line_shows_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However rare log lines are, memory does not grow."""
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    times = StepTimes(torch.device("cpu"))
    for _ in range(5 * MAX_MARKS):
        times.mark("data")
        times.mark("optimizer")
        assert len(times.marks) <= MAX_MARKS
    assert times.read() == {"data": 5.0 * MAX_MARKS, "optimizer": 5.0 * MAX_MARKS}
    assert times.read() == {}


def test_a_file_that_a_kill_cut_short_is_made_what_the_state_holds(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    restore_file(path, [{"step": 1}, {"step": 2}])
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    restore_file(path, [{"step": 1}, {"step": 2}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    before = path.stat().st_mtime_ns
    restore_file(path, [{"step": 1}, {"step": 2}])
    assert path.stat().st_mtime_ns == before


def test_the_logged_loss_is_the_mean_over_the_interval(tmp_path: Path) -> None:
    """Not the last update's, and each label counts once."""
    train_in_process(tmp_path / "each", epochs=1, log_interval=1)
    train_in_process(tmp_path / "four", epochs=1, log_interval=4)
    each = [r for r in read_metrics(tmp_path / "each") if "loss" in r]
    tokens = [0, *(r["tokens"] for r in each)]
    nats = [r["loss"] * (tokens[i + 1] - tokens[i]) for i, r in enumerate(each)]
    for record in (r for r in read_metrics(tmp_path / "four") if "loss" in r):
        end = record["step"]
        start = (end - 1) // 4 * 4
        mean = sum(nats[start:end]) / (tokens[end] - tokens[start])
        assert record["loss"] == pytest.approx(mean, rel=1e-6)


def test_records_hold_what_the_console_shows(tmp_path: Path) -> None:
    output = train_in_process(tmp_path, epochs=1, use_moe=1, eval_interval=6)
    found = read_metrics(tmp_path)
    for name in ("step", "epoch", "rows", "tokens", "loss", "aux_loss", "lr", "grad_norm"):
        assert name in found[0]
    assert {"tokens_per_second", "eta_minutes"} <= found[0].keys()
    assert f"loss {found[0]['loss']:.4f}  aux_loss {found[0]['aux_loss']:.4f}" in output
    evaluated = [r for r in found if "heldout_loss" in r]
    assert [r["step"] for r in evaluated] == [6, found[-1]["step"]]
    assert f"{evaluated[0]['heldout_bits_per_byte']:.4f} bits/byte" in output
    assert evaluated[0]["continuations"].keys() >= {"The capital of France is", "中国的首都是"}
    assert f"{evaluated[0]['repeated_4grams']:.0%} of their 4-grams are repeated" in output


def test_repeated_4grams_are_counted_in_each_row() -> None:
    loop, plain = [7] * 24, [*range(24)]
    assert repeated_ngrams([loop]) == pytest.approx(20 / 21)
    assert repeated_ngrams([plain, plain]) == 0  # each row by itself
    assert repeated_ngrams([loop, plain]) == pytest.approx(20 / 42)
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repeated_ngrams([[1, 1, 1], []]) == 0  # too short to have any


def test_what_follows_the_end_of_a_text_is_not_counted() -> None:
    """A row that ended is filled up with padding, which would count as a loop."""
    model, tokenizer = tiny_model(vocab_size=6400), AutoTokenizer.from_pretrained("model")
    first = model(encode_prompt(tokenizer, "ends")).logits[0, -1].argmax()
    model.config.eos_token_id = int(first)
    texts, repeated = continuations(model, tokenizer, ["ends", "goes on"])
    assert len(texts["ends"]) < len(texts["goes on"])
    assert repeated == continuations(model, tokenizer, ["goes on"])[1]


def test_held_out_loss_is_told_by_language_and_for_all_together(tmp_path: Path) -> None:
    """By their bytes, the languages' bits per byte make those of all."""
    documents = [
        *short_documents(60),
        *(f"第{i}个句子说的是{'很' * (i % 7 + 1)}长的河。" for i in range(60)),
    ]
    write_corpus(tmp_path / "corpus.jsonl", documents)
    output = train_in_process(tmp_path, epochs=1, heldout_fraction=0.3)
    last = read_metrics(tmp_path)[-1]
    shown = {name: last[f"heldout_bits_per_byte_{name}"] for name in ("zh", "en")}
    assert f", zh {shown['zh']:.4f}, en {shown['en']:.4f}" in output
    tokenizer = AutoTokenizer.from_pretrained("model")
    data = PretrainDataset(
        str(tmp_path / "corpus.jsonl"),
        tokenizer,
        32,
        cache_dir=str(tmp_path / "cache"),
        heldout_fraction=0.3,
    )
    kept = [documents[d] for d in data.is_held_out.nonzero().flatten().tolist()]
    num_bytes = {
        "zh": sum(len(t.encode()) for t in kept if "句" in t),
        "en": sum(len(t.encode()) for t in kept if "句" not in t),
    }
    assert min(num_bytes.values()) > 0
    bits = sum(shown[name] * num_bytes[name] for name in num_bytes)
    assert last["heldout_bits_per_byte"] == pytest.approx(bits / sum(num_bytes.values()))


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in to SwanLab."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)


def tracked(folder: Path) -> list[dict[int, float]]:
    """The losses by step of each run in the local dashboard's files, oldest first."""
    log_dir = folder / "out" / "swanlog"
    with sqlite3.connect(log_dir / "runs.swanlab") as database:
        query = (
            "select run_id, folder from experiment join tag on experiment.id = tag.experiment_id "
            "where tag.name = 'loss' order by experiment.id"
        )
        found = []
        for run_id, number in database.execute(query).fetchall():
            files = sorted((log_dir / run_id / "logs" / number).glob("*.log"))
            lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
            found.append({line["index"]: line["data"] for line in lines})
    database.close()
    return found


@pytest.mark.usefixtures("no_account")
def test_swanlab_shows_every_step_once_also_after_a_kill(tmp_path: Path) -> None:
    """Its real local dashboard, in real processes, nobody there to type a key."""
    extra = {"epochs": 2, "wandb_project": "tests"}
    words = [*tiny_flags(tmp_path, **extra), "--use_wandb"]
    train_and_kill(tmp_path, 7, words=words)
    done = run_command([sys.executable, "train_pretrain.py", *words, "--from_resume", "1"])
    assert done.returncode == 0, done.stderr
    assert "swanlab" not in done.stderr
    losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path) if "loss" in r}
    newest = tracked(tmp_path)[-1]
    assert newest == pytest.approx(losses)
    configs = list((tmp_path / "out" / "swanlog").rglob("config.yaml"))
    text = configs[-1].read_text()
    assert all(name in text for name in vars(parse_flags([])).keys() - {"program"})
    ids = {p.name.split("-")[-1] for p in (tmp_path / "out" / "swanlog").glob("run-*")}
    assert len(ids) == 1, "the resumed run took another id"


@pytest.mark.usefixtures("no_account")
def test_a_failing_swanlab_never_stops_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny_flags(tmp_path, epochs=1), "--use_wandb"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "swanlog").write_text("a file where its folder should be")
    assert train_pretrain.main(words) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: swanlab: ") and error.count("\n") == 1
    assert (tmp_path / "out" / "pretrain_32.pth").exists()


def test_swanlab_is_imported_only_when_asked_for() -> None:
    done = run_command(
        [sys.executable, "-c", "import sys, train_pretrain; assert 'swanlab' not in sys.modules"]
    )
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------- usual mistakes


def said_by(changes: dict, updates: int = 5000) -> str:
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    return "; ".join(describe.likely_mistakes(parse_flags(words), updates, 256))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_is_warned_of(preset: str) -> None:
    assert said_by({"preset": preset}) == ""


@pytest.mark.parametrize(
    ("changes", "updates", "said"),
    [
        (
            {"learning_rate": 0.1},
            5000,
            "--learning_rate 0.1 is high for a width of 768: above 0.003",
        ),
        ({"learning_rate": 1e-3}, 5000, "AdamW at --learning_rate 0.001 without a warm-up"),
        ({"epochs": 5}, 5000, "5 passes over the data"),
        ({}, 62, "only 62 updates"),
    ],
)
def test_usual_mistakes_are_told_before_the_run(changes: dict, updates: int, said: str) -> None:
    assert said in said_by(changes, updates)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 5e-4},
        {"learning_rate": 1e-3, "warmup_ratio": 0.05},
        {"learning_rate": 1e-3, "optimizer": "muon"},
    ],
    ids=str,
)
def test_a_warm_up_is_asked_for_only_where_it_helps(changes: dict) -> None:
    assert said_by(changes) == ""


def test_a_held_out_loss_that_rises_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the best one so far; a real rise takes many passes, so a margin below zero here."""
    assert "held-out loss has risen" not in train_in_process(tmp_path, eval_interval=6)
    held = [r["heldout_loss"] for r in read_metrics(tmp_path) if "heldout_loss" in r]
    monkeypatch.setattr(metrics, "OVERFITTING_NATS", -10.0)
    output = train_in_process(tmp_path, eval_interval=6, log_interval=6, overwrite=1)
    rows = [r["rows"] for r in read_metrics(tmp_path) if "rows" in r]
    epochs = max(r["epoch"] for r in read_metrics(tmp_path) if "epoch" in r)
    told = r"has risen from ([\d.]+), after ([\d.]+) passes .*(?:--epochs (\d+);|(rate)$)"
    warned = re.findall(told, output, re.MULTILINE)
    assert {bool(fewer) for *_, fewer, _ in warned} == {False, True}
    for i, (lowest, passes, fewer, _) in enumerate(warned, start=1):
        best = min(range(i), key=held.__getitem__)
        assert lowest == f"{held[best]:.4f}"
        # The last update of a pass is shorter, which the message does not know.
        assert float(passes) == pytest.approx(rows[best] * epochs / rows[-1], abs=0.2)
        # In the first pass, fewer of them are no advice.
        assert bool(fewer) == (rows[i] > rows[-1] / epochs)
        assert not fewer or int(fewer) == max(1, round(float(passes)))
    assert len(warned) == len(held) - 1
