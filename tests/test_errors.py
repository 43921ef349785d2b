"""What people get wrong ends in one line: what was found, what was expected, the way out."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import eval_llm
import train_pretrain
from tests.running import run_command, tiny_flags, train_in_process

GOOD = '{"text": "a document"}\n'


def refusal(
    words: list[str], capsys: pytest.CaptureFixture[str], program=train_pretrain, lines: int = 1
) -> tuple:
    """Exit status and what is said on stderr: one line, but for a table."""
    capsys.readouterr()
    try:
        status = program.main(words)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == lines, error
    return status, error


def files(folder: Path) -> dict[str, bytes]:
    """All but the locks, and the file that says how the last start ended."""
    return {
        str(p): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock" and p.name not in (".lock", "run_state.json")
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "bf16"}, "--dtype: invalid choice: 'bf16'.*bfloat16.*float16.*float32"),
        ({"dtype": "fp16"}, "--dtype: invalid choice: 'fp16'"),
        ({"device": "cuda"}, "--device is cuda, but PyTorch finds no CUDA"),
        ({"device": "gpu"}, "--device is 'gpu', expected cuda, mps or cpu"),
        ({"hidden_size": 30}, "30 is not divisible by num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "4 is not divisible by num_key_value_heads 3"),
        (
            {"batch_size": 0, "epochs": -1},
            "--epochs is -1.*--batch_size is 0, expected 1 to 1000000",
        ),
        ({"learning_rate": 0}, "--learning_rate is 0.0, expected above 0"),
        ({"heldout_fraction": 1}, "--heldout_fraction is 1.0"),
        ({"seed": 2**63}, "--seed is 9223372036854775808, expected above -1e\\+18, below 1e\\+18"),
        ({"seed": -(10**30)}, "--seed is -10{30}, expected above"),
        ({"eval_tokens": 10**30}, "--eval_tokens is 10{30}, expected 1 or more, below 1e"),
        ({"timeout": 10**7}, "--timeout is 10000000, expected 1 to 1000000"),
        ({"batch_size": 10**30}, "--batch_size is 10{30}, expected 1 to 1000000"),
        ({"learning_rate": 1e38}, "--learning_rate is 1e.38, expected above 0, below 1000\\.$"),
        ({"learning_rate": "inf"}, "--learning_rate is inf, expected above 0, below 1000\\.$"),
        ({"weight_decay": "inf"}, "--weight_decay is inf, expected 0 to 100"),
        ({"embedding_lr_scale": "inf"}, "--embedding_lr_scale is inf, expected 1e-06 to 1000000"),
        ({"grad_clip": "nan"}, "--grad_clip is nan, expected above 0, at most inf"),
        (
            {"learning_rate": 20},
            "--learning_rate 20 x --weight_decay 0.1.*is 2, expected at most 1",
        ),
        ({"device": "meta"}, "--device is 'meta', expected cuda, mps or cpu"),
        ({"device": "xpu"}, "--device is 'xpu', expected cuda, mps or cpu"),
        ({"checkpoint_mirror": "no\n://such"}, r"--checkpoint_mirror no\\n://such is not a usable"),
        ({"device": "cuda:-1"}, "--device is 'cuda:-1', expected cuda, mps or cpu"),
        ({"max_seq_len": 1}, "--max_seq_len is 1, expected 2 to 32768"),
        ({"preset": "7b"}, "--preset: invalid choice: '7b'"),
        ({"learning_rte": 1}, "unrecognized arguments: --learning_rte.*mean --learning_rate\\?"),
        ({"tokenizer_path": "/nowhere"}, "--tokenizer_path /nowhere holds no tokenizer"),
    ],
)
def test_flags_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, expected: str
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    before = files(tmp_path)
    status, error = refusal(tiny_flags(tmp_path, **changes), capsys)
    assert status == 2 and re.search(expected, error), error
    assert files(tmp_path).keys() - before.keys() <= {str(tmp_path / "corpus.jsonl")}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{GOOD}{{broken\n{GOOD}", r"corpus.jsonl line 2 \(byte 23\): not valid JSON.* column 2"),
        (f'{GOOD}{GOOD}{{"txet": "x"}}\n', r"line 3 \(byte 46\): no \"text\"; its keys: 'txet'"),
        (f'{{"text": null}}\n{GOOD}', r'line 1 \(byte 0\): "text" is a JSON null'),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 .*: byte 0xff at column 11 is not UTF-8"),
        ("", "no records in .*corpus.jsonl"),
        ('\n\n{"text": "  "}\n', "corpus.jsonl: no document with text in it"),
    ],
)
def test_data_that_cannot_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, expected: str
) -> None:
    words = tiny_flags(tmp_path)
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "corpus.jsonl").write_bytes(data)
    before = files(tmp_path)
    status, error = refusal(words, capsys)
    assert status == 3 and re.search(expected, error), error
    assert files(tmp_path) == before


def test_not_every_document_can_be_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = refusal(tiny_flags(tmp_path, heldout_fraction=0.99999999999), capsys)
    assert status == 3 and "all 80 documents are held out. Lower --heldout_fraction" in error


def test_more_epochs_than_a_plan_can_hold_are_refused_with_the_most_possible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (10**12, 10**17):
        status, error = refusal(tiny_flags(tmp_path, epochs=epochs), capsys)
        found = re.search(rf"--epochs is {epochs}, expected at most (\d+) with (\d+) rows", error)
        assert status == 2 and found, error
        most, rows = map(int, found.groups())
        assert most == 2**40 // rows
    assert list((tmp_path / "checkpoints").glob("*_resume_*")) == []
    status, error = refusal(tiny_flags(tmp_path, epochs=most + 1), capsys)
    assert status == 2 and f"expected at most {most} " in error
    assert train_pretrain.main(tiny_flags(tmp_path, epochs=most, dry_run=1)) == 0


def test_weights_too_large_for_their_file_are_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_flags(tmp_path, learning_rate=10, embedding_lr_scale=1e6)
    status, error = refusal(words, capsys)
    assert status == 5 and "embed_tokens.weight is not finite in half precision" in error
    assert list((tmp_path / "out").glob("*.pth")) == []


def test_strange_flags_are_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, error = refusal(["--no\nsuch \udcff", "x\n"], capsys)
    assert status == 2 and r"unrecognized arguments: --no\nsuch \udcff x\n" in error


def test_a_missing_data_file_names_the_download_and_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "pretrain_t2t_mini.jsonl"
    status, error = refusal(tiny_flags(tmp_path, data_path=tmp_path / name), capsys)
    assert status == 3
    assert name in error and "minimind_dataset" in error and "--preset demo" in error
    status, error = refusal(tiny_flags(tmp_path, data_path="my_own.jsonl"), capsys)
    assert status == 3 and "my_own.jsonl: no such file. Expected a file" in error
    assert f"relative to {Path.cwd()}" in error and "minimind_dataset" not in error


def test_weights_of_another_shape_are_refused_with_the_sizes_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1, save_weight="base")
    before = files(tmp_path)
    deeper = tiny_flags(tmp_path, from_weight="base", num_hidden_layers=3, num_key_value_heads=4)
    status, error = refusal(deeper, capsys)
    assert status == 4
    assert "--from_weight base" in error and "base_32.pth" in error
    assert "model.layers.0.self_attn.k_proj.weight is (16, 32), not (32, 32)" in error
    assert "--num_hidden_layers 2" in error and "--num_key_value_heads 2" in error
    status, error = refusal(tiny_flags(tmp_path, from_weight="absent"), capsys)
    assert status == 4 and "absent_32.pth: no such file" in error
    (tmp_path / "out" / "broken_32.pth").write_bytes(b"no weights")
    status, error = refusal(tiny_flags(tmp_path, from_weight="broken"), capsys)
    assert status == 4 and "broken_32.pth cannot be loaded" in error
    (tmp_path / "out" / "broken_32.pth").unlink()
    assert files(tmp_path) == before


def test_another_runs_files_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1)
    before = files(tmp_path)
    status, error = refusal(tiny_flags(tmp_path, epochs=1), capsys)
    assert status == 4 and "belongs to an earlier run" in error
    assert "--from_resume 1" in error and "--overwrite 1" in error and "--save_weight" in error
    assert files(tmp_path) == before
    for state in (tmp_path / "checkpoints").glob("*_resume_*"):
        state.unlink()
    status, error = refusal(tiny_flags(tmp_path, epochs=1), capsys)
    assert status == 4 and "pretrain_32.pth belongs to an earlier run" in error
    train_in_process(tmp_path, epochs=1, seed=1, overwrite=1)
    assert files(tmp_path) != before


def test_a_resume_with_other_settings_names_each_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1)
    before = files(tmp_path)
    changed = {"learning_rate": 2e-3, "batch_size": 4, "accumulation_steps": 3}
    status, error = refusal(
        tiny_flags(tmp_path, epochs=1, from_resume=1, **changed), capsys, lines=4
    )
    assert status == 2
    rows = [line.split("  ") for line in error.splitlines()[1:]]
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert cells == [
        ["setting", "saved", "given"],
        ["learning_rate", "0.001", "0.002"],
        ["rows per update", "8", "12"],
    ]
    with (tmp_path / "corpus.jsonl").open("a") as corpus:
        corpus.write(GOOD)
    status, error = refusal(tiny_flags(tmp_path, epochs=1, from_resume=1), capsys, lines=3)
    assert status == 2 and "content of data_path" in error
    assert {k: v for k, v in files(tmp_path).items() if "cache" not in k and "corpus" not in k} == {
        k: v for k, v in before.items() if "cache" not in k and "corpus" not in k
    }


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(tmp_path, epochs=1, save_weight="base")
    tokenizer = json.loads(Path("model/tokenizer.json").read_text(encoding="utf-8"))
    extra = dict(tokenizer["added_tokens"][0], id=6400, content="<|extra|>")
    tokenizer["added_tokens"].append(extra)
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = Path("model/tokenizer_config.json").read_text(encoding="utf-8")
    (larger / "tokenizer_config.json").write_text(config, encoding="utf-8")
    places = ["--save_dir", str(tmp_path / "out"), "--weight", "base", "--device", "cpu"]
    status, error = refusal([*places, "--tokenizer_path", str(larger)], capsys, program=eval_llm)
    assert status == 2 and "6,401 entries" in error and "6,400" in error
    words = tiny_flags(tmp_path, from_weight="base", tokenizer_path=larger)
    status, error = refusal(words, capsys)
    assert status == 4 and "(6400, 32), not (6401, 32)" in error


def test_the_real_program_exits_with_the_status_and_one_line(tmp_path: Path) -> None:
    words = tiny_flags(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("{broken\n")
    done = run_command([sys.executable, "train_pretrain.py", *words])
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert "corpus.jsonl line 1 (byte 0): not valid JSON" in done.stderr


def test_a_lost_rank_does_not_keep_the_others_from_leaving() -> None:
    """With NCCL, an ordinary end would wait for what is on the device; here, for a thread."""
    program = (
        "import sys, threading\n"
        "from trainer import program as frame\n"
        "from trainer.errors import RankError\n"
        "from trainer.program import run_program\n"
        "frame.uses_nccl = lambda: True\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "def program():\n"
        "    raise RankError('rank 1 is gone')\n"
        "sys.exit(run_program(program))\n"
    )
    done = run_command([sys.executable, "-c", program], timeout=60)
    assert (done.returncode, done.stderr) == (8, "error: rank 1 is gone\n")
