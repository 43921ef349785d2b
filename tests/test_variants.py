"""scripts/try_variants.py: each variant changes what it says, and the table its differences."""

from collections.abc import Callable

import pytest
import torch

from model import model_minimind
from model.model_minimind import MiniMindForCausalLM
from scripts import try_variants
from tests.helpers import tiny_config


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants change the program for good; after a test it is as before."""
    monkeypatch.setattr(MiniMindForCausalLM, "__init__", MiniMindForCausalLM.__init__)
    monkeypatch.setattr(model_minimind, "next_token_nats", model_minimind.next_token_nats)


def weights(use_moe: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(MiniMindForCausalLM(tiny_config(use_moe=use_moe)).named_parameters())  # 2 layers


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize(("change", "deviation"), [
    (try_variants.drawn_outputs, 0.02), (try_variants.smaller_outputs, 0.01),
])
def test_outputs_of_layers_are_drawn_and_nothing_else(
    use_moe: bool, change: Callable, deviation: float
) -> None:
    before = weights(use_moe)
    try_variants.initialised(change)
    for name, now in weights(use_moe).items():
        if "o_proj" in name or "down_proj" in name:
            assert not before[name].any()
            assert now.std().item() == pytest.approx(deviation, rel=0.1)
        else:
            assert now.equal(before[name])


def test_by_width_matrices_keep_the_size_of_what_they_multiply() -> None:
    before = weights(False)
    try_variants.initialised(try_variants.by_width)
    for name, now in weights(False).items():
        if ".layers." in name and now.ndim == 2 and before[name].any():
            assert now.std().item() == pytest.approx(now.shape[1] ** -0.5, rel=0.1)
        else:
            assert now.equal(before[name])


def test_z_loss_is_added_in_training_alone() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[1, 3:] = model_minimind.IGNORE
    plain = model_minimind.next_token_nats(logits, labels)
    try_variants.z_loss(0.01)
    real = [logits[0, t] for t in range(4)] + [logits[1, t] for t in range(2)]
    z = sum(float(x.exp().sum().log()) ** 2 for x in real)
    now = model_minimind.next_token_nats(logits, labels)
    assert now.item() == pytest.approx(plain.item() + 0.01 * z, rel=1e-5)
    with torch.inference_mode():
        assert model_minimind.next_token_nats(logits, labels).equal(plain)


def test_the_table_compares_seed_by_seed() -> None:
    scores = {("as it is", 1): 2.0, ("as it is", 2): 3.0, ("--lr 1", 1): 2.5, ("--lr 1", 2): 2.9}
    trials = [{"variant": v, "seed": s, "bits_per_byte": b} for (v, s), b in scores.items()]
    last = try_variants.report(trials).splitlines()[-1]
    assert last == "| --lr 1 | 2.5000, 2.9000 | +0.2000 | -0.1000 to +0.5000 |"
    assert try_variants.flags_of("--lr 1e-2 --seed 3") == ["--lr", "1e-2", "--seed", "3"]
    assert try_variants.flags_of("z-loss 1e-4") == []
