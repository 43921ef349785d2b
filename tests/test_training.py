"""What one update does: its loss, its gradient, its rate."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_pretrain
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests import gradient_of_ranks
from tests.gradients import ROWS, step, toy_data, toy_model, toy_run, window_gradient
from tests.launched import run_trainers
from tests.running import read_metrics, train_in_process
from trainer.optimizer import build_optimizer, load_optimizer
from trainer.trainer_utils import get_lr, get_model_params


def plain_gradient(folder: Path, use_moe: bool) -> dict[str, torch.Tensor]:
    """The definition: all rows at once, summed cross-entropy over the number of labels."""
    batch = toy_data(folder).__getitems__(list(range(ROWS)))
    model = toy_model(use_moe)
    out = model(batch.input_ids, labels=batch.labels, document_starts=batch.document_starts)
    nats = F.cross_entropy(
        out.logits[:, :-1].reshape(-1, 6400), batch.labels[:, 1:].reshape(-1), reduction="sum"
    )
    loss = nats / (batch.labels[:, 1:] != -100).sum()
    (loss + out.aux_loss).backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    return gradient | {"losses": torch.stack((loss, out.aux_loss)).detach()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulation_steps"), [(16, 1), (1, 16), (2, 6), (3, 4)])
def test_micro_batches_give_the_gradient_of_one_batch(
    tmp_path: Path, batch_size: int, accumulation_steps: int, use_moe: bool
) -> None:
    found = window_gradient(tmp_path, batch_size, accumulation_steps, use_moe)
    assert_close(found, plain_gradient(tmp_path, use_moe))


@pytest.mark.parametrize("micro_batch_size", [1, 6, 12])
def test_the_micro_batch_changes_nothing_but_how_the_window_is_cut(
    tmp_path: Path, micro_batch_size: int
) -> None:
    found = window_gradient(tmp_path, 4, 3, use_moe=True, micro_batch_size=micro_batch_size)
    assert_close(found, plain_gradient(tmp_path, use_moe=True))


@pytest.mark.parametrize(("num_ranks", "splits"), [(2, [(2, 3), (1, 6)]), (4, [(3, 1), (1, 3)])])
def test_ranks_give_the_gradient_of_one_batch(
    tmp_path: Path, num_ranks: int, splits: list[tuple[int, int]]
) -> None:
    """The 11 rows fill none of these windows: a rank has padded rows, or a batch less. The first
    split is exchanged as with NCCL, the second as with gloo."""
    toy_data(tmp_path)
    words = [str(tmp_path), *(str(number) for split in splits for number in split)]
    log = tmp_path / "log"
    statuses = run_trainers(words, log, num_ranks, program=gradient_of_ranks.main)
    assert statuses == [0] * num_ranks, log.read_text()
    for (batch_size, accumulation_steps), one_by_one in zip(splits, (False, True), strict=True):
        found = torch.load(tmp_path / f"{batch_size}x{accumulation_steps}.pt")
        if one_by_one:
            assert found["sent within the backward pass"] > 0
            assert found["others on their way"] == 0
        else:
            assert found["sent within the backward pass"] == 1  # all but what only its end knows
        assert_close(found, plain_gradient(tmp_path, use_moe=True))


def test_float16_scaling_leaves_the_update_as_it_is(tmp_path: Path) -> None:
    """The scaler multiplies and divides by a power of two: nothing may remain of it."""
    data, moved = toy_data(tmp_path), []
    for enabled in (False, True):
        model = toy_model()
        run_ = toy_run(data, model, batch_size=4, accumulation_steps=3, grad_clip=0.5)
        run_.scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        for window, _ in train_pretrain.windows(run_, data):
            step(run_, window)
        moved.append([p.detach().clone() for p in model.parameters()])
    for plain, scaled in zip(*moved, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-12)


def test_an_update_with_infinite_float16_gradients_is_skipped(tmp_path: Path) -> None:
    data, model = toy_data(tmp_path), toy_model().float()
    run_ = toy_run(data, model, batch_size=16, accumulation_steps=1)
    run_.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    ((window, _),) = train_pretrain.windows(run_, data)
    step(run_, window)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert run_.scaler.get_scale() == 512.0


def test_a_gradient_is_clipped_to_its_norm(tmp_path: Path) -> None:
    data, model = toy_data(tmp_path), toy_model()
    before = [p.detach().clone() for p in model.parameters()]
    run_ = toy_run(data, model, batch_size=16, accumulation_steps=1, grad_clip=0.01)
    ((window, _),) = train_pretrain.windows(run_, data)
    norm = step(run_, window)[0].grad_norm
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert norm > 0.01
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_lr_falls_from_its_peak_to_a_tenth() -> None:
    table = {0: 5e-4, 250: 5e-4 * (0.1 + 0.45 * (1 + math.sqrt(0.5))), 500: 2.75e-4, 1000: 5e-5}
    for current, expected in table.items():
        assert get_lr(current, 1000, 5e-4) == pytest.approx(expected, rel=1e-12)
    rates = [get_lr(i, 1000, 1.0) for i in range(1001)]
    assert rates == sorted(rates, reverse=True)


def test_the_rate_follows_rows_over_all_epochs(tmp_path: Path) -> None:
    train_in_process(tmp_path, epochs=2, learning_rate=1e-3)
    logged = [r for r in read_metrics(tmp_path) if "loss" in r]
    rows = [0] + [r["rows"] for r in logged]
    for before, record in zip(rows, logged, strict=False):
        assert record["lr"] == pytest.approx(get_lr(before, rows[-1], 1e-3), rel=1e-12)
    per_epoch = rows[-1] // 2
    assert per_epoch % 8, "the last window of an epoch should be short here"
    assert [b - a for a, b in itertools.pairwise(rows)] == 2 * [
        *[8] * (per_epoch // 8),
        per_epoch % 8,
    ]


def test_only_matrices_decay() -> None:
    optimizer = build_optimizer(toy_model(use_moe=True).float(), 1e-3)
    by_decay = {
        group["weight_decay"]: {p.ndim for p in group["params"]} for group in optimizer.param_groups
    }
    assert by_decay == {0.1: {2, 3}, 0.0: {1}}
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["fused"]


def test_resuming_keeps_the_optimizers_own_flags() -> None:
    """torch would take over the file's: fused on a device that lacks it crashes the process."""
    model = toy_model().float()
    saved = build_optimizer(model, 1e-3).state_dict()
    saved["param_groups"][0] |= {"fused": None, "lr": 9.0, "weight_decay": 7.0}
    optimizer = build_optimizer(model, 1e-3)
    load_optimizer(optimizer, saved)
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["lr"] == 9.0, "of the last update; the next one sets its own"
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_parameters_are_counted_in_all_and_per_token() -> None:
    config = MiniMindConfig(use_moe=True)
    with torch.device("meta"):
        total, active = get_model_params(MiniMindForCausalLM(config), config)
    assert (f"{total / 1e6:.2f}M", f"{active / 1e6:.2f}M") == ("198.42M", "63.94M")


@pytest.mark.parametrize("use_moe", [0, 1])
@pytest.mark.parametrize("packing", [0, 1])
def test_a_tiny_model_learns(tmp_path: Path, use_moe: int, packing: int) -> None:
    """Also in bfloat16, the default."""
    settings = {"epochs": 2, "learning_rate": 1e-2, "dtype": "bfloat16", "eval_interval": 10}
    train_in_process(tmp_path, use_moe=use_moe, packing=packing, **settings)
    losses = [r["loss"] for r in read_metrics(tmp_path) if "loss" in r]
    assert losses[0] == pytest.approx(math.log(6400), abs=0.15)
    assert losses[-1] < losses[0] - 5
    held_out = [r["heldout_loss"] for r in read_metrics(tmp_path) if "heldout_loss" in r]
    assert held_out[-1] < held_out[0]
