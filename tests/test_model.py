"""The network, compared with transformers' classes, closed forms and plain loops."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from dataset.lm_dataset import PretrainDataset
from model import documents
from model.documents import document_bounds
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MoEFeedForward, balance_losses
from tests.helpers import perturbed, shipped_tokenizer, tiny_config, tiny_model, write_jsonl
from tests.running import short_documents
from trainer.trainer_utils import get_model_params

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE_AND_MOE = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    """Ids of ordinary tokens: no padding, BOS or EOS."""
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------- the same as Qwen3


def qwen_of(model: MiniMindForCausalLM) -> PreTrainedModel:
    """transformers' Qwen3, dense or MoE, with the sizes and weights of ``model``."""
    ours = model.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads head_dim max_position_embeddings rms_norm_eps"
    sizes = {name: getattr(ours, name) for name in names.split()} | {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta},
    }
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    if ours.use_moe:
        names = "moe_intermediate_size num_experts num_experts_per_tok norm_topk_prob"
        sizes |= {name: getattr(ours, name) for name in names.split()}
        for i in range(ours.num_hidden_layers):
            experts = f"model.layers.{i}.mlp.experts."
            gate, up, down = (
                torch.stack([state.pop(f"{experts}{e}.{part}.weight") for e in range(4)])
                for part in PROJECTIONS
            )
            state[experts + "gate_up_proj"] = torch.cat((gate, up), dim=1)
            state[experts + "down_proj"] = down
        twin = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    else:
        twin = Qwen3ForCausalLM(Qwen3Config(**sizes))
    twin.load_state_dict(state)
    return twin.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 8, "num_key_value_heads": 8},
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "rope_theta": 1e4},
        {"use_moe": True},
        {"use_moe": True, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
        {"use_moe": True, "num_experts_per_tok": 2, "norm_topk_prob": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_those_of_qwen3_with_the_same_weights(changes: dict) -> None:
    model, ids = tiny_model(**changes), random_ids(3, 40)
    torch.testing.assert_close(model(ids).logits, qwen_of(model)(ids).logits, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------- weights


@DENSE_AND_MOE
def test_weights_have_minimind_names(use_moe: bool) -> None:
    of_a_layer = {f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    of_a_layer |= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    of_a_layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    if use_moe:
        of_a_layer |= {f"mlp.experts.{i}.{name}.weight" for i in range(4) for name in PROJECTIONS}
        of_a_layer |= {"mlp.gate.weight"}
    else:
        of_a_layer |= {f"mlp.{name}.weight" for name in PROJECTIONS}
    expected = {f"model.layers.{i}.{name}" for i in range(2) for name in of_a_layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(tiny_model(use_moe=use_moe).state_dict()) == expected


@DENSE_AND_MOE
def test_loaded_weights_give_the_same_logits(use_moe: bool) -> None:
    saved, other = tiny_model(0, use_moe=use_moe), tiny_model(1, use_moe=use_moe)
    ids = random_ids(2, 9)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(ids).logits, saved(ids).logits)


def test_a_missing_expert_is_an_error() -> None:
    model = tiny_model(use_moe=True)
    state = model.state_dict()
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"experts\.up_proj"):
        model.load_state_dict(state)


def test_the_head_is_the_embedding() -> None:
    model = tiny_model()
    state = model.state_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize(
    ("sizes", "millions"),
    [
        ({"hidden_size": 512, "num_key_value_heads": 2, "intermediate_size": 1408}, [25.8, 25.8]),
        ({"hidden_size": 768, "num_hidden_layers": 8, "num_key_value_heads": 4}, [63.9, 63.9]),
        (
            {"num_hidden_layers": 16, "num_key_value_heads": 2, "intermediate_size": 2048},
            [104, 104],
        ),
        ({"use_moe": True}, [198.4, 63.9]),
    ],
    ids=["26m", "64m", "104m", "moe"],
)
def test_presets_have_their_number_of_parameters(sizes: dict, millions: list[float]) -> None:
    """The total, and the number used per token."""
    config = MiniMindConfig(**sizes)
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    assert [round(count / 1e6, 1) for count in get_model_params(model, config)] == millions


@pytest.mark.parametrize(
    ("sizes", "numbers"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, ["30", "4"]),
        ({"hidden_size": 36, "num_attention_heads": 4}, ["36", "4"]),  # an odd head_dim, 9
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["4", "3"]),
        ({"use_moe": True, "num_experts_per_tok": 5}, ["5", "4"]),
        ({"use_moe": True, "num_experts_per_tok": 0}, ["0", "4"]),
    ],
    ids=str,
)
def test_incompatible_sizes_are_named(sizes: dict, numbers: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        tiny_config(**sizes)
    assert all(number in str(caught.value) for number in numbers)


# ------------------------------------------------------------------------------ rotary tables


def test_rotary_tables_hold_the_angles_of_the_closed_form() -> None:
    tables = tiny_model(head_dim=8, rope_theta=1e4).model.rotary
    angles = [[p / 1e4 ** (2 * i / 8) for i in range(4)] for p in range(64)]
    expected = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(tables.cos.double(), expected.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(tables.sin.double(), expected.sin(), atol=1e-5, rtol=0)


def test_rotary_tables_are_in_no_file() -> None:
    model = tiny_model()
    assert {name for name, _ in model.named_buffers()} == {"model.rotary.cos", "model.rotary.sin"}
    assert not [name for name in model.state_dict() if "rotary" in name]


@pytest.mark.parametrize("unknown", ["attention_mask", "past_key_values", "use_cache", "anything"])
def test_an_unknown_argument_of_forward_is_a_type_error(unknown: str) -> None:
    """If it were ignored, as a cache once was, the result would be wrong without notice."""
    with pytest.raises(TypeError, match=unknown):
        tiny_model()(random_ids(1, 5), **{unknown: None})


# --------------------------------------------------------------------------------- packed rows

LENGTHS = (5, 1, 9, 2, 7)  # of the documents in a row, in tokens


def packed_row(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, labels, document_starts), each (1, 24): five documents and no padding."""
    begins = torch.tensor([sum(LENGTHS[:i]) for i in range(len(LENGTHS))])
    ids = random_ids(1, sum(LENGTHS), seed=seed)
    labels = ids.clone()
    labels[0, begins] = -100
    return ids, labels, begins.repeat_interleave(torch.tensor(LENGTHS))[None]


@DENSE_AND_MOE
def test_packed_documents_have_the_loss_of_one_document_a_row(use_moe: bool) -> None:
    model = tiny_model(use_moe=use_moe).double()
    ids, labels, starts = packed_row()
    packed = model(ids, labels=labels, document_starts=starts)
    nats = F.cross_entropy(packed.logits[0, :-1], labels[0, 1:], reduction="none")
    alone = []  # nats of each token; 0 where the next one begins a document
    for document in ids.split(LENGTHS, dim=1):
        logits = model(document).logits[0, :-1]
        alone += [F.cross_entropy(logits, document[0, 1:], reduction="none"), torch.zeros(1)]
    alone = torch.cat(alone[:-1])
    torch.testing.assert_close(nats, alone, atol=1e-10, rtol=0)
    assert packed.loss.item() == pytest.approx(alone.sum().item() / (24 - 5), abs=1e-10)


@DENSE_AND_MOE
@torch.no_grad()
def test_a_document_never_sees_another(use_moe: bool) -> None:
    model, (ids, _, starts) = tiny_model(use_moe=use_moe).double(), packed_row()
    changed = torch.where(starts == 6, packed_row(seed=2)[0], ids)
    one, other = (model(row, document_starts=starts).logits for row in (ids, changed))
    difference = (one - other).abs().amax(-1)
    assert (difference[starts != 6] <= 1e-12).all()
    assert (difference[starts == 6] > 1e-3).all()


def test_the_stream_between_layers_may_be_bfloat16_with_products_in_float32() -> None:
    """Rounded after each addition, and nowhere else."""
    model, (ids, _, starts) = tiny_model(), packed_row()
    exact = model(ids, document_starts=starts).logits
    model.model.residual_dtype = torch.bfloat16
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, given, out: seen.append(out[0].dtype))
        layer.mlp.register_forward_hook(lambda mlp, given, out: seen.append(out.dtype))
    rounded = model(ids, document_starts=starts).logits
    assert seen == [torch.float32, torch.bfloat16] * len(model.model.layers)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(rounded, exact)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compiled code is global state: remove it before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@DENSE_AND_MOE
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised and hidden within dynamo
def test_all_layers_share_one_compiled_graph(use_moe: bool) -> None:
    """In bfloat16, the default on CUDA; the loss is the second graph."""
    counters.clear()
    model, (ids, labels, starts) = tiny_model(num_hidden_layers=12, use_moe=use_moe), packed_row()
    expected = model(ids, labels=labels, document_starts=starts).loss
    model.compile_parts(backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=labels, document_starts=starts)
        (out.loss + out.aux_loss).backward()
    torch.testing.assert_close(out.loss, expected, atol=0.02, rtol=0)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


# ---------------------------------------------------------------------------------------- loss


@DENSE_AND_MOE
def test_loss_is_the_mean_over_labels_that_carry_loss(use_moe: bool) -> None:
    model, ids = tiny_model(use_moe=use_moe).double(), random_ids(2, 6)
    labels = ids.clone()
    labels[0, 3] = labels[1, 4:] = -100
    out = model(ids, labels=labels)
    log_probs = out.logits.log_softmax(-1)
    scored = [(0, 1), (0, 2), (0, 4), (0, 5), (1, 1), (1, 2), (1, 3)]
    by_hand = -sum(log_probs[b, t - 1, ids[b, t]].item() for b, t in scored) / len(scored)
    assert out.loss.item() == pytest.approx(by_hand, abs=1e-12)


@DENSE_AND_MOE
def test_a_row_without_labels_has_loss_zero_and_finite_gradients(use_moe: bool) -> None:
    model, ids = tiny_model(use_moe=use_moe), random_ids(1, 6)
    out = model(ids, labels=torch.full_like(ids, -100), document_starts=torch.full_like(ids, -1))
    (out.loss + out.aux_loss).backward()
    assert out.loss.item() == out.aux_loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("width", [64, 256, 768, 1536])
def test_first_loss_is_near_log_vocab_size(width: int) -> None:
    """As the run announces; with embeddings of one size for all widths it was 15 at 768."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=width, num_hidden_layers=1))
    ids = torch.randint(0, 6400, (4, 64))
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(6400), abs=0.15)


@DENSE_AND_MOE
def test_each_layer_starts_as_the_identity_and_all_other_weights_are_random(use_moe: bool) -> None:
    torch.manual_seed(0)
    model, ids = MiniMindForCausalLM(tiny_config(use_moe=use_moe)), random_ids(2, 9)
    with torch.no_grad():
        untouched = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
        torch.testing.assert_close(model(ids).logits, untouched)
    for name, weight in model.named_parameters():
        if "o_proj" not in name and "down_proj" not in name and weight.ndim > 1:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name


# ------------------------------------------------------------------------------------- experts


def loop_over_tokens(mlp: MoEFeedForward, tokens: Tensor) -> Tensor:
    """The mixture by its definition, one token and expert at a time: (N, D) -> (N, D)."""
    gate, up, down = (getattr(mlp.experts, name) for name in PROJECTIONS)
    outputs = []
    for x in tokens:
        probs = (mlp.gate.weight @ x).softmax(0)
        best = probs.argsort(descending=True)[: mlp.num_used].tolist()
        total = sum(probs[e] for e in best)
        parts = [probs[e] / total * (down[e] @ (F.silu(gate[e] @ x) * (up[e] @ x))) for e in best]
        outputs.append(sum(parts))
    return torch.stack(outputs)


def output_and_gradients(mlp: MoEFeedForward, x: Tensor, plain: bool) -> list[Tensor]:
    """The layer's output, and the gradients of its sum of squares for input and weights."""
    mlp.zero_grad()
    x = x.detach().requires_grad_()
    y = loop_over_tokens(mlp, x[0])[None] if plain else mlp(x)[0]
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in mlp.parameters())]


@pytest.mark.parametrize(
    ("dtype", "width", "tolerance"),
    [
        (torch.float64, 48, 1e-12),  # no kernel: one product per expert
        (torch.float32, 48, 1e-4),
        (torch.float32, 50, 1e-4),  # a width that the kernel does not support
        (torch.bfloat16, 48, 2e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize(("num_tokens", "num_used"), [(3, 1), (40, 1), (40, 2)])
def test_stacked_experts_equal_a_loop_over_tokens(
    dtype: torch.dtype, width: int, tolerance: float, num_tokens: int, num_used: int
) -> None:
    model = tiny_model(use_moe=True, moe_intermediate_size=width, num_experts_per_tok=num_used)
    mlp = model.model.layers[0].mlp
    # With this seed no token is so close to a tie that rounding decides its experts.
    generator = torch.Generator().manual_seed(33)
    x = torch.randn(1, num_tokens, 32, generator=generator)
    low = dtype == torch.bfloat16  # as in training: weights in float32, products in bfloat16
    kept = torch.float32 if low else dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = output_and_gradients(mlp.to(kept), x.to(kept), plain=False)
    expected = output_and_gradients(mlp.double(), x.double(), plain=True)
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().clamp(min=1).item()
        torch.testing.assert_close(one.double(), other, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("num_used", [1, 2])
@pytest.mark.parametrize("num_real", [30, 17])
def test_balance_loss_of_a_row_equals_that_of_transformers(num_used: int, num_real: int) -> None:
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    real = torch.arange(30)[None] < num_real
    mask = None if num_real == 30 else real
    expected = load_balancing_loss_func((logits,), 4, num_used, mask)
    probs = logits.softmax(-1)[None]
    sent = F.one_hot(probs.topk(num_used).indices, 4).sum(2) * real.unsqueeze(-1)
    found = balance_losses(probs[None], sent[None], real, torch.tensor([7]))
    torch.testing.assert_close(found, expected[None], atol=1e-6, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_padding_never_enters_the_balance_loss(packed: bool) -> None:
    model, (ids, labels, starts) = tiny_model(use_moe=True).double(), packed_row()
    padded = {"input_ids": F.pad(ids, (0, 9)), "labels": F.pad(labels, (0, 9), value=-100)}
    plain = {"input_ids": ids, "labels": labels}
    if packed:
        plain["document_starts"] = starts
        padded["document_starts"] = F.pad(starts, (0, 9), value=-1)
    expected = model(**plain).aux_loss.item()
    assert expected > 5e-4 * 2 * 0.9  # two layers, each about 1 when balanced
    assert model(**padded).aux_loss.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [3, 1]], ids=str)
def test_both_losses_are_the_same_however_rows_are_grouped(sizes: list[int]) -> None:
    model, ids = tiny_model(use_moe=True).double(), random_ids(4, 12)
    labels = ids.masked_fill(torch.arange(12) >= torch.tensor([[12], [3], [7], [9]]), -100)
    num_labels = [11, 2, 6, 8]
    expected = sum(
        n * torch.stack((out.loss, out.aux_loss))
        for n, row, label in zip(num_labels, ids, labels, strict=True)
        for out in [model(row[None], labels=label[None])]
    ) / sum(num_labels)
    found = torch.zeros(2, dtype=torch.float64)
    for part in torch.arange(4).split(sizes):
        out = model(ids[part], labels=labels[part])
        share = sum(num_labels[i] for i in part) / sum(num_labels)
        found += share * torch.stack((out.loss, out.aux_loss))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_an_odd_head_dim_is_named() -> None:
    with pytest.raises(ValueError, match="7"):
        tiny_config(head_dim=7)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_experts_compile_in_float32_on_the_cpu() -> None:
    model, (ids, labels, starts) = tiny_model(use_moe=True), packed_row()
    expected = model(ids, labels=labels, document_starts=starts).loss
    compiled = torch.compile(model, backend="eager", dynamic=False)
    found = compiled(ids, labels=labels, document_starts=starts).loss
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------- attention within documents


def attend_in_a_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    same: Tensor,
    longest: int,
    _: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """Stands in for torch's kernel, which needs CUDA: the same result, one document at a time."""
    assert ends is same and window_size == (-1, 0) and k.shape == v.shape
    assert ends[0] == 0 and ends[-1] == len(q) and (ends.diff() >= 0).all()
    assert ends.dtype == torch.int32 and ends.diff().max() <= longest
    parts = []
    for begin, end in itertools.pairwise(ends.tolist()):
        if begin < end:
            own = (part[begin:end].transpose(0, 1) for part in (q, k, v))
            y = F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)
            parts.append(y.transpose(0, 1))
    return torch.cat(parts)


@DENSE_AND_MOE
def test_attention_within_documents_gives_what_the_mask_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_moe: bool
) -> None:
    """Loss and gradients of whole epochs, with documents split between rows, and padding."""
    monkeypatch.setattr(documents, "_varlen_attn", attend_in_a_loop)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", short_documents())
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MiniMindForCausalLM(MiniMindConfig(32, 2, use_moe, **sizes)).double()
    perturbed(model, 0.02)
    for length in (5, 16, 64):
        data = PretrainDataset(
            str(corpus), shipped_tokenizer(), length, cache_dir=str(tmp_path / "cache")
        )
        for first in range(0, len(data), 40):
            batch = data.__getitems__(list(range(first, first + 40)))
            found = []
            for attends_within in (False, True):
                model.attends_within = attends_within
                model.zero_grad()
                out = model(
                    batch.input_ids,
                    labels=batch.labels,
                    document_starts=batch.document_starts,
                    max_documents=batch.max_documents,
                )
                (out.loss + out.aux_loss).backward()
                found.append([out.loss, *(p.grad.clone() for p in model.parameters())])
            for masked, within in zip(*found, strict=True):
                assert torch.allclose(masked, within, atol=1e-12)


def attend_by_bounds(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: object, **__: object):
    """Likewise, without a loop over documents, so that it compiles."""
    position = torch.arange(len(q), dtype=torch.int32)
    document = torch.searchsorted(bounds, position, right=True)
    mask = (document[:, None] == document) & (position[:, None] >= position)
    parts = (part.transpose(0, 1) for part in (q, k, v))
    return F.scaled_dot_product_attention(*parts, mask, enable_gqa=True).transpose(0, 1)


@DENSE_AND_MOE
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised and hidden within dynamo
def test_uneven_documents_compile_once_for_training_and_once_for_evaluation(
    monkeypatch: pytest.MonkeyPatch, use_moe: bool
) -> None:
    monkeypatch.setattr(documents, "_varlen_attn", attend_by_bounds)
    counters.clear()
    model, eager = (tiny_model(use_moe=use_moe) for _ in range(2))
    model.attends_within = eager.attends_within = True
    model.compile_parts(backend="eager")
    dice = torch.Generator().manual_seed(0)
    for update in range(50):
        begins = torch.rand(2, 40, generator=dice) < torch.rand(1, generator=dice)
        begins[:, 0] = True
        starts = torch.where(begins, torch.arange(40), 0).cummax(1).values
        ids = torch.randint(96, (2, 40), generator=dice)
        batch = {"labels": ids, "document_starts": starts, "max_documents": int(begins.sum())}
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, **batch).loss.backward()
        if update % 10 == 9:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                found, expected = (m(ids, **batch).loss for m in (model, eager))
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert counters["stats"]["unique_graphs"] == 4, "layer and loss, in training and evaluation"
    assert not counters["graph_break"]


def test_the_shape_of_the_bounds_depends_only_on_max_documents() -> None:
    starts = torch.tensor([[0, 0, 2, 2, -1, -1], [0, 0, 0, 0, 0, 5], [-1] * 6])
    bounds = [0, 2, 4, 6, 11, 12]  # those from 4 and from 12 are padding
    assert document_bounds(starts, 6).tolist() == [*bounds, 18]
    assert document_bounds(starts, 8).tolist() == [*bounds, 18, 18, 18]
    assert document_bounds(starts, 32).tolist() == [*bounds, *[18] * 27]
    assert document_bounds(starts.to("meta"), 8).shape == (9,)
