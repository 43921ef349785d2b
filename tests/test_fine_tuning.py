"""train_full_sft.py: the same loop and guarantees, on conversations."""

import contextlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import jinja2
import pytest
import tokenizers
import torch
import transformers

import eval_llm
import train_full_sft
from dataset.conversations import Marks, written_out
from model.model_minimind import MiniMindForCausalLM
from tests.helpers import ROOT, shipped_tokenizer
from tests.running import (
    assert_same,
    metrics_without_times,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
    train_and_kill,
    train_in_process,
    training_command,
)
from tests.test_conversations import some_conversations, write
from trainer.checkpoint import list_states, read_state, save_state
from trainer.command_line import parse_flags
from trainer.weights import load_weights, read_config, read_weights

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


command = partial(training_command, program="train_full_sft.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    said = fine_tune(folder)
    share, held_out = re.search(
        r"data: 120 conversations, .* (\d+)% of .* learned; (\d+) held out", said
    ).groups()
    assert 30 < int(share) < 70 and int(held_out) > 0
    return folder


def test_the_defaults_are_minimind_s() -> None:
    args = parse_flags([], program=train_full_sft.FULL_SFT)
    found = (args.save_weight, args.from_weight, args.epochs, args.batch_size, args.learning_rate)
    assert found == ("full_sft", "pretrain", 2, 16, 1e-5)
    assert (args.accumulation_steps, args.max_seq_len, args.log_interval) == (1, 768, 100)
    assert args.data_path == ["dataset/sft_t2t_mini.jsonl"] and args.hidden_size == 768
    assert args.wandb_project == "MiniMind-Full-SFT"
    assert args.system_share == 0.0
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
def test_a_killed_run_resumes_to_the_last_bit(tmp_path: Path, num_ranks: int) -> None:
    changes = {"accumulation_steps": 2 // num_ranks, "system_share": 0.5, "dropout": 0.1}
    expected = tmp_path / "whole"
    done = run_command(command(sft_flags(expected, **changes), num_ranks))
    assert done.returncode == 0, done.stderr
    cut = tmp_path / "cut"
    train_and_kill(cut, 10, num_ranks, sft_flags(cut, **changes), "train_full_sft.py")
    done = run_command(command([*sft_flags(cut, **changes), "--from_resume", "1"], num_ranks))
    assert done.returncode == 0, done.stderr
    for part in ("model", "optimizer", "rng", "progress"):
        found, wanted = (newest_state(folder, NAME)[part] for folder in (cut, expected))
        assert_same(found, wanted, part)
    assert metrics_without_times(cut) == metrics_without_times(expected)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates of twelve rows, on one rank."""
    folder = tmp_path_factory.mktemp("twelve")
    fine_tune(folder, batch_size=12, accumulation_steps=1)
    return folder


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_any_number_of_ranks_learns_the_same(twelve: Path, tmp_path: Path, num_ranks: int) -> None:
    words = sft_flags(tmp_path, batch_size=12 // num_ranks, accumulation_steps=1)
    done = run_command(command(words, num_ranks))
    assert done.returncode == 0, done.stderr
    pairs = zip(read_metrics(tmp_path), read_metrics(twelve), strict=True)
    for found, expected in pairs:
        for key in ("loss", "heldout_loss"):
            assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-4)


def test_a_run_from_before_a_flag_existed_resumes_with_its_older_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine_tune(tmp_path, epochs=1)
    (path, *_) = list_states(tmp_path / "checkpoints", NAME)
    state = read_state(path)
    del state["settings"]["system_share"], state["settings"]["empty_thinking"]
    save_state(tmp_path / "checkpoints", NAME, state["step"], state)
    assert "nothing to do" in fine_tune(tmp_path, epochs=1, from_resume=1)
    words = sft_flags(tmp_path, epochs=1, from_resume=1, system_share=0.5)
    assert train_full_sft.main(words) == 2
    assert re.search(r"system_share +0\.0 +0\.5", capsys.readouterr().err)


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
    assert "--learning_rate 0.001 is as high as in pretraining (0.001)" in output.getvalue()
    described = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    assert described["config"]["num_key_value_heads"] == 1
    assert described["config"]["intermediate_size"] == 40
    assert described["config"]["tie_word_embeddings"] is False
    assert float(first) < 8.7


def test_a_base_that_learnt_other_tokens_is_noticed(tmp_path: Path) -> None:
    train_in_process(tmp_path, epochs=1)
    said = fine_tune(tmp_path, from_weight="pretrain", epochs=1)
    assert "another tokenizer" not in said
    other = tmp_path / "other"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(ROOT / "model"))
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.save_pretrained(other)
    changes = {"from_weight": "pretrain", "epochs": 1, "overwrite": 1, "tokenizer_path": other}
    assert "warning: pretrain was trained with another tokenizer" in fine_tune(tmp_path, **changes)


@pytest.mark.parametrize(
    "text", ["[]", '{"config": 3, "run": 4}', '{"run": {"settings": []}}', "{"]
)
def test_a_description_that_somebody_broke_stops_nothing_before_the_weights_are_read(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain_32.json").write_text(text)
    assert train_full_sft.main(sft_flags(tmp_path, from_weight="pretrain")) == 4
    assert "pretrain_32.pth: no such file." in capsys.readouterr().err


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


# --------------------------------------------------------------------------------------- talking


def evaluated(folder: Path, *words: object, typed: str = "") -> str:
    """What eval_llm.py prints with the weights of a run."""
    command = [sys.executable, "eval_llm.py", "--save_dir", folder / "out", "--device", "cpu"]
    done = subprocess.run(
        [*map(str, [*command, "--max_new_tokens", 5, *words])],
        cwd=ROOT,
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_that_answer_get_the_template_and_others_do_not(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    tokenizer = shipped_tokenizer()

    class Model:
        def generate(self, ids: torch.Tensor, **_: object) -> torch.Tensor:
            seen.append(tokenizer.decode(ids[0]))
            answer = tokenizer("yes<|im_end|>", add_special_tokens=False)["input_ids"]
            return torch.cat((ids, torch.tensor([answer])), 1)

    monkeypatch.setattr(eval_llm, "generating_model", lambda model: Model())
    typed = iter(["one?", "two?", "three?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    words = ["--save_dir", str(whole / "out"), "--device", "cpu", "--weight", "full_sft"]
    assert eval_llm.main([*words, "--interactive", "1", "--historys", "2"]) == 0
    begin = "<|im_start|>assistant\n"
    turns = [f"<|im_start|>user\n{word}?<|im_end|>\n{begin}" for word in ("one", "two", "three")]
    said = "yes<|im_end|>\n"
    assert seen == [turns[0], turns[0] + said + turns[1], turns[1] + said + turns[2]]

    seen.clear()
    path = whole / "out" / "pretrain_copy.pth"  # without a description, the name tells
    path.write_bytes((whole / "out" / f"{NAME}.pth").read_bytes())
    assert eval_llm.main([*words[:-1], str(path), "--prompt", "one?"]) == 0
    assert seen == ["<|im_start|>one?"]
    seen.clear()
    assert eval_llm.main([*words[:-1], str(path), "--prompt", "one?", "--chat", "1"]) == 0
    assert seen == [turns[0]]
    assert eval_llm.main([*words, "--history", "3"]) == 2
    assert "--history is 3, expected an even number" in capsys.readouterr().err


def test_an_answer_ends_with_its_turn(whole: Path) -> None:
    said = evaluated(whole, "--weight", "full_sft", "--prompt", "word1", "--temperature", 0)
    assert said.startswith("word1\n") and "<|im" not in said
    asked = evaluated(whole, "--weight", "full_sft", "--interactive", 1, typed="word1\nword2\n\n")
    assert asked.count("tokens/s]") == 2


def test_the_loss_on_conversations_is_that_of_the_answers(whole: Path) -> None:
    path = whole / "chats.jsonl"
    said = evaluated(whole, "--weight", "full_sft", "--data_path", path, "--max_seq_len", 1024)
    loss, bits = re.search(r"loss ([\d.]+) nats/token, ([\d.]+) bits/byte", said).groups()
    tokenizer = shipped_tokenizer()
    marks, nats, labels, num_bytes = Marks(tokenizer), 0.0, 0, 0
    weights = whole / "out" / f"{NAME}.pth"
    model = MiniMindForCausalLM(read_config(weights, read_weights(weights))).eval()
    load_weights(model, weights, flag="")
    for record in some_conversations(120):
        text = written_out(tokenizer, record["conversations"], None)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
        assert ids.shape[1] <= 1024, "none loses its context, as where one goes on in another row"
        for first, end in marks.spans(ids[0].tolist()):
            places = torch.arange(first, end)
            nats -= scores[places - 1, ids[0, places]].sum().item()
            labels += end - first
        num_bytes += marks.num_bytes(text)
    assert float(loss) == pytest.approx(nats / labels, abs=2e-3)
    assert float(bits) == pytest.approx(nats / math.log(2) / num_bytes, abs=2e-3)


# ----------------------------------------------------------------------------------- out and back


def export(folder: Path, to: str, output: Path) -> None:
    words = ["--weight", "full_sft", "--save_dir", folder / "out", "--to", to, "--output", output]
    done = run_command([sys.executable, "-m", "scripts.export", *map(str, words)])
    assert done.returncode == 0, done.stderr


def test_the_export_talks_in_transformers_own_pipeline(whole: Path, tmp_path: Path) -> None:
    export(whole, "hf", tmp_path / "hf")
    talk = transformers.pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    question = [{"role": "user", "content": "word1"}]
    (answer,) = talk(question, max_new_tokens=5, do_sample=False)
    reply = answer["generated_text"][-1]
    assert reply["role"] == "assistant"
    said = evaluated(whole, "--weight", "full_sft", "--prompt", "word1", "--temperature", 0)
    assert said.removeprefix("word1\n").startswith(reply["content"].strip("\n"))


def test_a_gguf_file_has_the_template_without_marks_that_llama_cpp_lacks(
    whole: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    export(whole, "gguf", tmp_path / "a.gguf")
    template = gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.chat_template"].contents()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = jinja2.Environment().from_string(template).render(messages=turns)
    assert written == written_out(shipped_tokenizer(), turns, None)


@pytest.mark.skipif("LLAMA_SERVER" not in os.environ, reason="LLAMA_SERVER names no llama-server")
def test_llama_server_writes_our_template(whole: Path, tmp_path: Path) -> None:
    """LLAMA_SERVER=path/to/llama-server pytest tests/test_fine_tuning.py"""
    pytest.importorskip("gguf")
    export(whole, "gguf", tmp_path / "a.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [os.environ["LLAMA_SERVER"], "-m", tmp_path / "a.gguf", "--port", port, "-t", 1]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "word1"}]

    def post(path: str, content: dict) -> dict:
        body = json.dumps({"messages": turns} | content).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body)
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return json.load(reply)

    with subprocess.Popen(
        [*map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    written = post("/apply-template", {})["prompt"]
                    break
                except OSError:  # not yet
                    assert server.poll() is None and time.monotonic() < deadline
                    time.sleep(0.2)
            answer = post("/v1/chat/completions", {"max_tokens": 5, "temperature": 0})
        finally:
            server.terminate()
    tokenizer = shipped_tokenizer()
    expected = written_out(tokenizer, turns, None, for_answer=True)
    assert written in (expected, expected.removeprefix("<|im_start|>"))  # which it adds itself
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
