"""eval_llm.py: it finds weights, continues prompts and measures files."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

import eval_llm
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers import perturbed
from tests.running import short_documents, train_in_process, write_corpus
from trainer.weights import read_config, read_weights, save_weights


def evaluate(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    places = ["--save_dir", str(folder), "--device", "cpu"]
    assert eval_llm.main([*places, *words]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights that have memorized two sentences."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = ["The sky over the sea is blue.", "雪是白色的，草是绿色的。"] * 20
    folder.joinpath("corpus.jsonl").write_text("")
    write_corpus(folder / "corpus.jsonl", corpus)
    train_in_process(
        folder, epochs=20, learning_rate=1e-2, heldout_fraction=0, accumulation_steps=1
    )
    return folder / "out"


def test_a_prompt_is_continued_by_what_was_learnt(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "The sky over", "--prompt", "雪是", "--temperature", "0"]
    output = evaluate(trained, capsys, *words)
    assert "The sky over the sea is blue.\n" in output
    assert "雪是白色的，草是绿色的。\n" in output
    assert output.count("tokens/s]") == 2


def test_the_same_seed_draws_the_same_text(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(seed: int) -> str:
        words = ["--prompt", "Q", "--temperature", "5", "--top_p", "1", "--top_k", "0"]
        output = evaluate(trained, capsys, *words, "--seed", str(seed), "--max_new_tokens", "20")
        return output.split("[")[0]

    assert drawn(1) == drawn(1) != drawn(2)


def test_prompts_are_built_in_and_can_be_typed(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = evaluate(trained, capsys, "--max_new_tokens", "2")
    assert all(prompt in output for prompt in eval_llm.PROMPTS)
    typed = iter(["The sky", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    output = evaluate(trained, capsys, "--interactive", "1", "--temperature", "0")
    assert "over the sea is blue." in output


def test_the_loss_of_a_file_is_that_of_its_documents_one_at_a_time(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each document fits into a row, so the reference may read them one at a time."""
    documents = ["The sky over the sea is blue.", "雪是白色的。", *short_documents(3)]
    corpus = write_corpus(tmp_path / "some.jsonl", documents)
    words = ["--data_path", str(corpus), "--cache_dir", str(tmp_path), "--max_seq_len", "2048"]
    output = evaluate(trained, capsys, *words)

    path = trained / "pretrain_32.pth"
    model = MiniMindForCausalLM(read_config(path, {})).eval()
    model.load_state_dict(read_weights(path))
    tokenizer = AutoTokenizer.from_pretrained("model")
    nats = num_labels = 0
    for document in documents:
        ids = torch.tensor([1, *tokenizer.encode(document), 2])
        nats += F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
        num_labels += len(ids) - 1
    num_bytes = sum(len(document.encode()) for document in documents)
    assert f"loss {nats / num_labels:.4f} nats/token" in output
    assert f"{nats / math.log(2) / num_bytes:.4f} bits/byte" in output
    assert output.endswith("), rows of 2048 tokens\n")  # the loss depends on it


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_architecture_of_weights_without_a_json_follows_from_their_shapes(
    tmp_path: Path, use_moe: bool
) -> None:
    """Files published by MiniMind have no json."""
    config = MiniMindConfig(
        48, 3, use_moe, num_attention_heads=6, num_key_value_heads=2, vocab_size=6401, num_experts=5
    )
    path = tmp_path / "pretrain_48.pth"
    model = MiniMindForCausalLM(config).eval()
    save_weights(path, model, {})
    described = json.loads(path.with_suffix(".json").read_text())["config"]
    path.with_suffix(".json").unlink()
    state = torch.load(path, weights_only=True)
    found = read_config(path, state).to_dict()
    sizes = ["hidden_size", "num_hidden_layers", "use_moe", "num_attention_heads", "vocab_size"]
    sizes += ["num_key_value_heads", "head_dim", "intermediate_size"]
    sizes += ["num_experts", "moe_intermediate_size"] * use_moe
    assert {name: found[name] for name in sizes} == {name: described[name] for name in sizes}


@pytest.mark.parametrize("use_moe", [False, True])
def test_saved_weights_are_in_half_precision_and_contain_each_matrix_once(
    tmp_path: Path, use_moe: bool
) -> None:
    config = MiniMindConfig(32, 2, use_moe, num_attention_heads=4, num_key_value_heads=2)
    model = perturbed(MiniMindForCausalLM(config), 0.02)
    path = tmp_path / "w.pth"
    save_weights(path, model, {"step": 3})
    state = torch.load(path, weights_only=True)
    assert {v.dtype for v in state.values()} == {torch.float16}
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value.half()), key
    num_bytes = 2 * sum(p.numel() for p in model.parameters())
    assert num_bytes < path.stat().st_size < num_bytes * 1.05 + 20_000
    assert json.loads(path.with_suffix(".json").read_text())["run"] == {"step": 3}


def test_several_matching_weights_are_an_error_that_lists_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (16, 32):
        config = MiniMindConfig(size, 1, num_attention_heads=2, num_key_value_heads=1)
        save_weights(tmp_path / f"pretrain_{size}.pth", MiniMindForCausalLM(config), {})
    words = ["--save_dir", str(tmp_path), "--max_new_tokens", "1", "--device", "cpu"]
    assert eval_llm.main(words) == 4
    error = capsys.readouterr().err
    assert "pretrain_16.pth, pretrain_32.pth" in error and "--hidden_size" in error
    assert "[" in evaluate(tmp_path, capsys, "--hidden_size", "16", "--max_new_tokens", "1")
    by_path = str(tmp_path / "pretrain_32.pth")
    assert "[" in evaluate(tmp_path, capsys, "--weight", by_path, "--max_new_tokens", "1")
