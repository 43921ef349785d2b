"""bench/try_variants.py: each variant changes what it says, and the table its differences."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from bench import try_variants
from bench.measuring import drawn_outputs, redraw
from model.model_minimind import IGNORE, MiniMindForCausalLM, next_token_nats
from tests.helpers import tiny_config


def weights(use_moe: bool, change: Callable | None = None) -> dict[str, torch.Tensor]:
    """Those that a model begins with, by name; two layers."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(tiny_config(use_moe=use_moe))
    if change:
        redraw(change, SimpleNamespace(model=model, config=model.config))
    return dict(model.named_parameters())


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize(
    ("change", "deviation"), [(drawn_outputs, 0.02), (try_variants.smaller_outputs, 0.01)]
)
def test_outputs_of_layers_are_drawn_and_nothing_else(
    use_moe: bool, change: Callable, deviation: float
) -> None:
    before = weights(use_moe)
    for name, now in weights(use_moe, change).items():
        if "o_proj" in name or "down_proj" in name:
            assert not before[name].any()
            assert now.std().item() == pytest.approx(deviation, rel=0.1)
        else:
            assert now.equal(before[name])


def test_a_plain_embedding_is_drawn_with_one_deviation_and_nothing_else() -> None:
    before = weights(False)
    for name, now in weights(False, try_variants.plain_embedding).items():
        same = now.equal(before[name])
        assert same != (name == "model.embed_tokens.weight"), name
        if not same:
            assert now.std().item() == pytest.approx(0.02, rel=0.1)


def test_by_width_matrices_keep_the_size_of_what_they_multiply() -> None:
    before = weights(False)
    for name, now in weights(False, try_variants.by_width).items():
        if ".layers." in name and now.ndim == 2 and before[name].any():
            assert now.std().item() == pytest.approx(now.shape[1] ** -0.5, rel=0.1)
        else:
            assert now.equal(before[name])


def test_z_loss_is_added_in_training_alone() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[1, 3:] = IGNORE
    plain, loss = next_token_nats(logits, labels), try_variants.ZLoss(0.01)
    real = [logits[0, t] for t in range(4)] + [logits[1, t] for t in range(2)]
    z = sum(float(x.exp().sum().log()) ** 2 for x in real)
    assert loss(logits, labels).item() == pytest.approx(plain.item() + 0.01 * z, rel=1e-5)
    assert loss.eval()(logits, labels).equal(plain)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compiled code is global; leave none behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own, which it hides itself
def test_a_model_learns_by_the_loss_that_took_the_place_of_its_own(compiled: bool) -> None:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(tiny_config())
    ids = torch.randint(3, 96, (2, 8))
    plain = model(ids, labels=ids).loss.item()
    try_variants.z_loss(0.01, SimpleNamespace(model=model))
    if compiled:
        model.compile_parts(backend="eager")
    assert model(ids, labels=ids).loss.item() > plain + 0.1
    assert model.eval()(ids, labels=ids).loss.item() == pytest.approx(plain)


def test_the_table_compares_seed_by_seed() -> None:
    scores = {("as it is", 1): 2.0, ("as it is", 2): 3.0, ("--lr 1", 1): 2.5, ("--lr 1", 2): 2.9}
    trials = [{"variant": v, "seed": s, "bits_per_byte": b} for (v, s), b in scores.items()]
    last = try_variants.report(trials).splitlines()[-1]
    assert last == "| --lr 1 | 2.5000, 2.9000 | +0.2000 | -0.1000 to +0.5000 |"
    assert try_variants.flags_of("--lr 1e-2 --seed 3") == ["--lr", "1e-2", "--seed", "3"]
    assert try_variants.flags_of("z-loss 1e-4") == []
