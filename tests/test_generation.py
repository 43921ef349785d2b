"""Text generation by transformers' class with our tensors, also if it computes something else.

The reference is the model's own forward pass over whole rows, which has no KV cache."""

import math
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM, TextIteratorStreamer, TextStreamer

import eval_llm
from model import generation
from model.generation import GenerationError, generating_model
from model.model_minimind import MiniMindForCausalLM
from scripts import export, web_demo
from tests.helpers import shipped_tokenizer, tiny_model
from tests.running import read_metrics, train_in_process
from trainer.weights import save_weights

DENSE_AND_MOE = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    """Ids of ordinary tokens: no padding, BOS or EOS."""
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------- what it computes


@DENSE_AND_MOE
def test_greedy_generation_equals_the_uncached_forward(use_moe: bool) -> None:
    model, ids = tiny_model(use_moe=use_moe, eos_token_id=None), random_ids(2, 5)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    for _ in range(12):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, ids)


@DENSE_AND_MOE
def test_left_padded_prompts_continue_as_each_does_alone(use_moe: bool) -> None:
    model = tiny_model(use_moe=use_moe, eos_token_id=None)
    prompts = [random_ids(1, length, seed=length) for length in (7, 4, 1)]
    ids = torch.cat([F.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    options = {"max_new_tokens": 10, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(ids, attention_mask=(ids != 0).long(), **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, **options)
        assert torch.equal(together.sequences[i, 7:], alone.sequences[0, prompt.shape[1] :])
        for both, one in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(both[i], one[0], atol=1e-5, rtol=0)


def test_streamed_text_is_the_generated_text(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, model = shipped_tokenizer(), tiny_model(vocab_size=6400, eos_token_id=None)
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False}
    text = tokenizer.decode(model.generate(prompt, **options)[0, prompt.shape[1] :])
    assert len(text) > 20
    model.generate(prompt, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, args=(prompt,), kwargs={"streamer": streamer, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text and len(pieces) > 5


@DENSE_AND_MOE
def test_tensors_are_shared_where_their_layout_is_the_same(use_moe: bool) -> None:
    model = tiny_model(use_moe=use_moe)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    qwen = generating_model(model)
    copied = {name for name, p in qwen.named_parameters() if p.data_ptr() not in own}
    assert copied == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2) if use_moe}
    assert type(qwen) is (Qwen3MoeForCausalLM if use_moe else Qwen3ForCausalLM)


@DENSE_AND_MOE
def test_generation_follows_updates_of_the_weights(use_moe: bool) -> None:
    model, ids = tiny_model(use_moe=use_moe), random_ids(1, 9)
    before = generating_model(model)(ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
        torch.testing.assert_close(generating_model(model)(ids).logits, model(ids).logits)
        assert (before - model(ids).logits).abs().max() > 0.1


def test_generation_keeps_training_mode_and_does_not_recompile() -> None:
    torch._dynamo.reset()
    counters.clear()
    model, ids = tiny_model(eos_token_id=None), random_ids(1, 9)
    model.compile_parts(backend="eager")
    model.train()
    plain = tiny_model(eos_token_id=None).generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), plain)
    assert model.training and all(module.training for module in model.modules())
    assert counters["stats"]["unique_graphs"] <= 1  # from the comparison
    torch._dynamo.reset()


@pytest.mark.parametrize(("head_dim", "theta"), [(16, 1e6), (96, 1e6), (64, 1e4)])
@torch.no_grad()
def test_stretched_positions_are_those_of_minimind(head_dim: int, theta: float) -> None:
    """MiniMind slows pairs that rotate less than once in 2,048 positions by 16, keeps those that
    rotate more than 32 times, and interpolates between. Our forward pass gets these tables."""
    sizes = {"head_dim": head_dim, "rope_theta": theta, "max_position_embeddings": 128}
    model, ids = tiny_model(**sizes), random_ids(1, 100)
    plain = model(ids).logits

    def pair_rotating(times: int) -> float:
        return head_dim * math.log(2048 / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_rotating(32)), 0)
    high = min(math.ceil(pair_rotating(1)), head_dim // 2 - 1)
    frequencies = []
    for i in range(head_dim // 2):
        slow = min(max((i - low) / max(high - low, 0.001), 0), 1)
        frequencies.append(theta ** (-2 * i / head_dim) * (1 - slow + slow / 16))
    angles = torch.outer(torch.arange(128.0), torch.tensor(frequencies))
    model.config.inference_rope_scaling = True
    stretched = generating_model(model)(ids).logits
    model.model.rotary.cos, model.model.rotary.sin = angles.cos(), angles.sin()
    torch.testing.assert_close(stretched, model(ids).logits, atol=1e-4, rtol=0)
    assert (stretched - plain).abs().max() > 1e-2


# -------------------------------------------------- a transformers that computes something else


class Forgetful(Qwen3ForCausalLM):
    """Ignores the KV cache, as happened when transformers 5.24 renamed its argument."""

    def forward(self, *args: object, **options: object) -> object:
        kept = {k: v for k, v in options.items() if k not in ("cache", "past_key_values")}
        return super().forward(*args, **kept | {"use_cache": False})


class Unmasked(Qwen3ForCausalLM):
    """Correct with the cache, wrong for a whole row, as if the mask were lost."""

    def forward(self, input_ids: Tensor, **options: object) -> object:
        if input_ids.shape[1] > 1 and "position_ids" not in options:
            input_ids = input_ids.flip(1)
        return super().forward(input_ids, **options)


class Moved(Qwen3ForCausalLM):
    """Has another name for a part that we use."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.model.embedding = self.model._modules.pop("embed_tokens")


@pytest.fixture(params=[Forgetful, Unmasked, Moved])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers whose class does something else."""
    monkeypatch.setattr(generation.transformers, "Qwen3ForCausalLM", request.param)


def saved(folder: Path) -> Path:
    sizes = {"vocab_size": 6400, "hidden_size": 64, "intermediate_size": 96}
    path = folder / "pretrain_64.pth"
    save_weights(path, tiny_model(**sizes), {})
    return path


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("program", ["eval_llm", "web_demo", "export"])
def test_a_class_that_computes_something_else_gives_one_line_and_no_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], program: str
) -> None:
    weight = ["--weight", str(saved(tmp_path))]
    output = tmp_path / "exported"
    status = {
        "eval_llm": lambda: eval_llm.main([*weight, "--device", "cpu"]),
        "web_demo": lambda: web_demo.main([*weight, "--device", "cpu"]),
        "export": lambda: export.main([*weight, "--to", "hf", "--output", str(output)]),
    }[program]()
    assert status == 4
    printed, line = capfd.readouterr()
    assert printed == "" and line.count("\n") == 1
    assert line.startswith("error: transformers 5.") and "pip install -r requirements.txt" in line
    assert not output.exists()


@pytest.mark.usefixtures("broken")
def test_training_continues_without_samples_and_says_so_once(tmp_path: Path) -> None:
    printed = train_in_process(tmp_path, learning_rate=1e-2, epochs=6, eval_interval=40)
    assert printed.count("Training continues without samples") == 1
    evaluations = [record for record in read_metrics(tmp_path) if "continuations" in record]
    assert len(evaluations) > 1
    assert all(record["continuations"] == {} for record in evaluations)
    assert all("heldout_loss" in record for record in evaluations)


def test_the_model_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compared = tiny_model(), []
    monkeypatch.setattr(generation, "compare", lambda *models: compared.append(models))
    generating_model(model)
    generating_model(model)
    assert len(compared) == 1


def test_out_of_memory_is_not_blamed_on_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "build_qwen", short)
    with pytest.raises(torch.OutOfMemoryError):
        generating_model(tiny_model())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_blamed_on_transformers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], value: float
) -> None:
    model = tiny_model(vocab_size=6400, hidden_size=64, intermediate_size=96)
    path = tmp_path / "pretrain_64.pth"
    save_weights(path, model, {})
    state = torch.load(path)  # as another program may have written it: ours refuses to
    state["model.norm.weight"][3] = value
    torch.save(state, path)
    weight = ["--weight", str(path)]
    assert eval_llm.main([*weight, "--device", "cpu"]) == 4
    printed, line = capfd.readouterr()
    assert printed == "" and line.count("\n") == 1
    assert "numbers that are not finite" in line and "transformers" not in line


def test_a_model_whose_logits_are_all_zero_is_accepted() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert generating_model(model) is not None


def test_a_model_before_its_first_update_is_accepted() -> None:
    """Its layers add nothing yet, so logits agree whatever the cache does."""
    model = MiniMindForCausalLM(tiny_model().config)
    assert generating_model(model) is not None


def test_a_model_whose_stream_is_rounded_in_training_is_accepted() -> None:
    """It is compared as it is opened elsewhere: nothing is rounded."""
    model = tiny_model()
    model.model.residual_dtype = torch.bfloat16
    assert generating_model(model) is not None
    assert model.model.residual_dtype is torch.bfloat16


def test_the_error_has_the_exit_status_of_unusable_weights() -> None:
    assert GenerationError("").exit_status == 4
