"""A model whose output head is a matrix of its own: trained, saved, resumed, opened elsewhere."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.generation import build_qwen, generating_model
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import export
from tests.helpers import tiny_config, tiny_model
from tests.running import assert_same, newest_state, read_metrics, train_and_kill, train_in_process
from trainer.command_line import parse_flags
from trainer.errors import CheckpointError
from trainer.metrics import flops_per_token
from trainer.weights import load_weights, read_config, read_weights, save_weights

SHIPPED = {"vocab_size": 6400, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, MiniMindForCausalLM]:
    """A weights file, and the model in it."""
    model = tiny_model(**SHIPPED, max_position_embeddings=256, tie_word_embeddings=False)
    path = tmp_path / "pretrain_64.pth"
    save_weights(path, model, {})
    model.load_state_dict(read_weights(path))  # rounded to float16, as in the file
    return path, model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """For two rows of tokens that every vocabulary has."""
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    return model(ids).logits


@pytest.mark.parametrize("use_moe", [False, True])
def test_transformers_computes_the_same(use_moe: bool) -> None:
    model = tiny_model(use_moe=use_moe, tie_word_embeddings=False)
    assert not model.lm_head.weight.equal(model.model.embed_tokens.weight)
    torch.testing.assert_close(logits(build_qwen(model)), logits(model), atol=1e-5, rtol=0)
    assert generating_model(model) is not None


def test_at_first_all_tokens_are_equally_probable() -> None:
    model = MiniMindForCausalLM(tiny_config(tie_word_embeddings=False))
    ids = torch.randint(3, 96, (1, 16))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(96))
    assert model.model.embed_tokens.weight.std() > 0.01


def test_a_killed_and_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": 0, "optimizer": "muon", "head_lr_scale": 3, "dropout": 0.1}
    train_in_process(tmp_path / "whole", **settings)
    train_and_kill(tmp_path / "cut", 7, **settings)
    train_in_process(tmp_path / "cut", **settings, from_resume=1)
    whole, cut = (newest_state(tmp_path / name) for name in ("whole", "cut"))
    assert_same(cut["model"], whole["model"])
    assert_same(cut["optimizer"], whole["optimizer"])
    head = whole["model"]["lm_head.weight"]
    assert head.abs().max() > 0 and not head.equal(whole["model"]["model.embed_tokens.weight"])
    assert read_metrics(tmp_path / "cut")[-1]["continuations"]  # transformers agrees


def test_the_file_tells_even_without_its_description(
    saved: tuple[Path, MiniMindForCausalLM],
) -> None:
    path, model = saved
    for _ in range(2):
        config = read_config(path, read_weights(path))
        assert config.tie_word_embeddings is False
        opened = MiniMindForCausalLM(config).eval()
        load_weights(opened, path, "--weight")
        assert logits(opened).equal(logits(model))
        path.with_suffix(".json").unlink(missing_ok=True)


def test_a_tied_model_does_not_take_it(saved: tuple[Path, MiniMindForCausalLM]) -> None:
    """Which of the two matrices it would end with would depend on their order."""
    path, _ = saved
    tied = tiny_model(**SHIPPED, max_position_embeddings=256)
    before = {name: weight.clone() for name, weight in tied.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"to which it is tied.*--tie_word_embeddings 0"):
        load_weights(tied, path, "--from_weight pretrain")
    assert_same(dict(tied.state_dict()), before)


def test_it_begins_from_a_tied_one(tmp_path: Path) -> None:
    tied = tiny_model(**SHIPPED)
    save_weights(tmp_path / "tied.pth", tied, {})
    tied.load_state_dict(read_weights(tmp_path / "tied.pth"))
    untied = tiny_model(seed=1, **SHIPPED, tie_word_embeddings=False)
    load_weights(untied, tmp_path / "tied.pth", "--from_weight tied")
    assert logits(untied).equal(logits(tied))


def test_export_to_transformers_and_back_changes_no_bit(
    saved: tuple[Path, MiniMindForCausalLM], tmp_path: Path
) -> None:
    path, model = saved
    folder = tmp_path / "hf"
    words = ["--to", "hf", "--weight", path, "--output", folder]
    assert export.main([str(word) for word in words]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=0)
    words = ["--from", "hf", "--input", folder, "--save_dir", tmp_path / "back"]
    assert export.main([str(word) for word in words]) == 0
    back = tmp_path / "back" / "imported_64.pth"
    assert_same(read_weights(back), {n: w.half() for n, w in model.state_dict().items()})
    assert read_config(back, read_weights(back)).tie_word_embeddings is False


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_gguf_file_has_its_head(
    saved: tuple[Path, MiniMindForCausalLM], tmp_path: Path, kind: str
) -> None:
    gguf = pytest.importorskip("gguf")
    path, model = saved
    words = ["--to", "gguf", "--gguf_type", kind, "--weight", path, "--output", tmp_path / "out"]
    assert export.main([str(word) for word in words]) == 0
    (file,) = (f for f in [tmp_path / "out", *(tmp_path / "out").glob("*")] if f.is_file())
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    head = tensors["output.weight"]
    values = torch.tensor(gguf.dequantize(head.data, head.tensor_type))
    close = {"f16": 0.0, "q8_0": 0.01}[kind]
    torch.testing.assert_close(values, model.lm_head.weight, atol=close, rtol=0)


def test_an_embedding_that_is_only_looked_up_takes_no_operations() -> None:
    sizes = {"hidden_size": 64, "vocab_size": 640}
    tied, untied = (MiniMindConfig(**sizes, tie_word_embeddings=tie) for tie in (True, False))
    matrix = 64 * 640
    assert flops_per_token(untied, 10**6 + matrix, 32) == flops_per_token(tied, 10**6, 32)


def test_the_flag_reaches_the_model() -> None:
    for words, tied in (([], True), (["--tie_word_embeddings", "0"], False)):
        config = MiniMindConfig(**parse_flags(words).architecture())
        assert config.tie_word_embeddings is tied
