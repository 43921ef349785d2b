"""Muon against torch's own, AdamW beside it, and the rate's schedules against their values."""

import math
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_model
from tests.launched import run_trainers
from tests.running import assert_same, newest_state, read_metrics, tiny_flags, train_in_process
from trainer import optimizer as optimizers
from trainer.muon import orthogonalize
from trainer.optimizer import (
    OPTIMIZERS,
    WEIGHT_DECAY,
    Tuning,
    build_optimizer,
    expected_state,
    set_lr,
    skips_bad_updates,
    step_if_finite,
)
from trainer.schedule import learning_rate

NOT_SCALING = torch.amp.GradScaler("cpu", enabled=False)


def moved(optimizers: list[torch.optim.Optimizer], model: torch.nn.Module) -> dict:
    """The weights after five updates by made-up gradients."""
    torch.manual_seed(1)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_hidden(name: str, p: torch.Tensor) -> bool:
    return ".layers." in name and p.ndim >= 2 and "mlp.gate." not in name


def torch_s_own(
    model: torch.nn.Module, rate: float, momentum: float = 0.95
) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon for what is hidden, AdamW for the rest."""
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if is_hidden(name, p)]
    others = [p for name, p in named.items() if not is_hidden(name, p)]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            hidden,
            lr=rate,
            weight_decay=WEIGHT_DECAY,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(groups, lr=rate, betas=Tuning().betas),
    ]


@pytest.mark.parametrize("momentum", [0.95, 0.8])
def test_muon_moves_weights_as_torch_s_own_does(momentum: float) -> None:
    """Both multiply in bfloat16, in another order: moves of 0.05 agree to a few per cent."""
    ours, theirs = tiny_model(), tiny_model()
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    tuning = Tuning(muon_momentum=momentum)
    found = moved([build_optimizer(ours, 0.02, "muon", tuning=tuning)], ours)
    expected = moved(torch_s_own(theirs, 0.02, momentum), theirs)
    assert any(is_hidden(name, p) for name, p in start.items())
    for name, before in start.items():
        change, reference = found[name] - before, expected[name] - before
        limit = 0.05 if is_hidden(name, before) else 1e-5
        assert (change - reference).norm() <= limit * reference.norm(), name


def test_each_expert_moves_like_a_matrix_of_its_own() -> None:
    model = tiny_model(use_moe=True)
    optimizer = build_optimizer(model, 0.02, "muon", torch.float32)
    stacked = model.model.layers[0].mlp.experts.gate_proj
    alone = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stacked]
    reference = torch.optim.Muon(
        alone, lr=0.02, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for matrix, gradient in zip(alone, stacked.grad, strict=True):
        matrix.grad = gradient.clone()
    start = stacked.detach().clone()
    optimizer.step()
    reference.step()
    expected = torch.stack([matrix.detach() for matrix in alone]) - start
    assert ((stacked.detach() - start) - expected).norm() <= 0.05 * expected.norm()
    router = model.model.layers[0].mlp.gate.weight
    assert set(optimizer.state[router]) == {"step", "exp_avg", "exp_avg_sq"}


def test_rows_move_as_the_formula_of_normuon_says() -> None:
    """Computed row by row, in float64, from the orthogonal directions of plain Muon."""
    ours, plain = (tiny_model(use_moe=True) for _ in range(2))
    beta, rate = 0.9, 0.02
    with_rows = build_optimizer(ours, rate, "muon", torch.float32, Tuning(muon_beta2=beta))
    without = build_optimizer(plain, rate, "muon", torch.float32)
    names = [name for name, p in plain.named_parameters() if is_hidden(name, p)]
    mean_squares: dict[tuple, float] = {}
    for update in range(1, 4):
        for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        starts = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (ours, plain)]
        with_rows.step()
        without.step()
        for name in names:
            found, plainly = (
                (dict(m.named_parameters())[name].detach() - s[name] * (1 - rate * WEIGHT_DECAY))
                .double()
                .reshape(-1, *s[name].shape[-2:])
                for m, s in zip((ours, plain), starts, strict=True)
            )
            for e, matrix in enumerate(plainly):
                rows = []
                for r, row in enumerate(matrix):
                    square = (row**2).mean().item()
                    kept = mean_squares.get((name, e, r), 0.0) * beta + square * (1 - beta)
                    mean_squares[name, e, r] = kept
                    rows.append(row / math.sqrt(kept / (1 - beta**update)))
                expected = torch.stack(rows)
                expected *= matrix.norm() / expected.norm()
                torch.testing.assert_close(found[e], expected, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_each_matrix_moves_when_it_is_its_turn(period: int) -> None:
    """As many times as far; its momentum, in float64 here, has followed every gradient."""
    model, rate, mu = tiny_model(use_moe=True, num_hidden_layers=3), 0.02, 0.9
    tuning = Tuning(muon_momentum=mu, muon_period=period)
    optimizer = build_optimizer(model, rate, "muon", torch.float32, tuning)
    hidden = {n: p for n, p in model.named_parameters() if is_hidden(n, p)}
    momenta = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in hidden.items()}
    before: dict[torch.Size, int] = {}  # matrices of each shape
    place = {n: before.setdefault(p.shape, 0) for n, p in hidden.items()}
    for name, p in hidden.items():
        place[name], before[p.shape] = before[p.shape], before[p.shape] + 1
    for update in range(2 * period + 1):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        gradients = {n: p.grad.double() for n, p in hidden.items() if p.grad is not None}
        starts = {n: p.detach().double() for n, p in hidden.items()}
        set_lr(optimizer, rate, update)
        optimizer.step()
        for name, p in hidden.items():
            momenta[name] = mu * momenta[name] + (1 - mu) * gradients[name]
            expected = starts[name]
            if place[name] % period == update % period:
                blend = mu * momenta[name] + (1 - mu) * gradients[name]
                move = 0.2 * math.sqrt(max(p.shape[-2:])) * orthogonalize(blend, torch.float64)
                expected = expected * (1 - period * rate * WEIGHT_DECAY) - period * rate * move
            torch.testing.assert_close(p.double(), expected, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scales_and_betas_are_those_of_separate_optimizers(kind: str) -> None:
    """A scaled rate does not scale the decay, which stays learning rate x weight decay."""
    ours, theirs = (tiny_model(use_moe=True, tie_word_embeddings=False) for _ in range(2))
    tuning = Tuning(12.0, 6.0, 4.0, 0.8, 0.98, 0.9, weight_decay=0.3)
    optimizer = build_optimizer(ours, 0.01, kind, torch.float32, tuning)
    assert set_lr(optimizer, 0.02, 0) == 0.02
    named = dict(theirs.named_parameters())
    vectors = [p for p in named.values() if p.ndim < 2]
    hidden = [p for name, p in named.items() if kind == "muon" and is_hidden(name, p)]
    embedding, head = [theirs.model.embed_tokens.weight], [theirs.lm_head.weight]
    apart = {id(p) for p in [*vectors, *hidden, *embedding, *head]}
    rest = [p for p in named.values() if id(p) not in apart]
    betas = {"betas": (0.8, 0.98)}
    reference: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(embedding, lr=0.24, weight_decay=0.3 / 12, **betas),
        torch.optim.AdamW(head, lr=0.12, weight_decay=0.3 / 6, **betas),
        torch.optim.AdamW(vectors, lr=0.08, weight_decay=0, **betas),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.3, **betas),
    ]
    found, expected = moved([optimizer], ours), moved(reference, theirs)
    for name, p in found.items():
        if not any(named[name] is h for h in hidden):
            torch.testing.assert_close(p, expected[name], msg=name)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 16, 16)])
def test_singular_values_are_drawn_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (3, 16, 40)])
def test_long_matrices_end_as_the_iteration_leads_them(shape: tuple[int, ...]) -> None:
    """In exact arithmetic, each step multiplies every singular value x by a + b x^2 + c x^4."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / x.norm(dim=(-2, -1))[..., None]
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = (left * values[..., None, :]) @ right
    found = orthogonalize(x.float(), torch.float32).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_same_rate_moves_weights_as_far_as_adamw_does() -> None:
    """So rates transfer: the root mean square of a move is about that of AdamW's, rate x 0.2."""
    torch.manual_seed(0)
    model = tiny_model(hidden_size=64, intermediate_size=192)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, 0.01, "muon")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        if is_hidden(name, p):
            move = p - start[name] * (1 - 0.01 * WEIGHT_DECAY)
            assert 0.6 < move.square().mean().sqrt() / (0.01 * 0.2) < 1.3, name


@pytest.mark.parametrize(("beta2", "period"), [(0.0, 1), (0.95, 1), (0.95, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_update_changes_neither_weights_nor_moments(
    value: float, beta2: float, period: int
) -> None:
    model = tiny_model()
    tuning = Tuning(muon_beta2=beta2, muon_period=period)
    optimizer = build_optimizer(model, 0.02, "muon", tuning=tuning)
    for update, bad in enumerate((False, False, True, False)):
        set_lr(optimizer, 0.02, update)
        for p in model.parameters():
            p.grad = torch.full_like(p, value) if bad else torch.randn_like(p)
        before = [p.detach().clone() for p in model.parameters()]
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
        norm = torch.tensor(value if bad else 1.0)
        step_if_finite(optimizer, NOT_SCALING, torch.zeros(3), norm)
        for p, weight, state in zip(model.parameters(), before, states, strict=True):
            assert torch.equal(p, weight) or not bad
            if bad:
                assert_same(dict(optimizer.state[p]), state)
        moved_now = [not torch.equal(*two) for two in zip(model.parameters(), before, strict=True)]
        assert any(moved_now) != bad and all(moved_now) == (not bad and period == 1)


@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_the_state_is_what_is_expected_of_it(beta2: float) -> None:
    model = tiny_model(use_moe=True)
    optimizer = build_optimizer(model, 0.02, "muon", tuning=Tuning(muon_beta2=beta2))
    moved([optimizer], model)
    saved, expected = optimizer.state_dict()["state"], expected_state(optimizer)
    assert saved.keys() == expected.keys()
    for number, state in saved.items():
        assert {k: v.shape for k, v in state.items()} == {
            k: v.shape for k, v in expected[number].items()
        }


@pytest.mark.parametrize("use_moe", [0, 1])
def test_a_killed_run_with_muon_goes_on_to_the_last_bit(tmp_path: Path, use_moe: int) -> None:
    settings = {"optimizer": "muon", "lr_schedule": "wsd", "warmup_ratio": 0.2, "use_moe": use_moe}
    settings |= {"muon_beta2": 0.95 * use_moe, "muon_period": 1 + use_moe}
    train_in_process(tmp_path / "whole", **settings)
    killed = [("die_in_update", {"step": 8, "how": "SIGKILL"})]
    words, log = tiny_flags(tmp_path / "cut", **settings), tmp_path / "log"
    assert run_trainers(words, log, faults=killed) == [-signal.SIGKILL]
    train_in_process(tmp_path / "cut", **settings, from_resume=1)
    name = "pretrain_32_moe" if use_moe else "pretrain_32"
    assert_same(newest_state(tmp_path / "cut", name), newest_state(tmp_path / "whole", name))
    rates = [r["lr"] for r in read_metrics(tmp_path / "whole") if "lr" in r]
    assert rates[0] < max(rates) > 10 * rates[-1]


# ----------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "expected"),
    [
        ("cosine", 0.0, 0.4, {0: 1, 0.25: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.5: 0.55, 1: 0.1}),
        ("cosine", 0.2, 0.4, {0: 0.05, 0.1: 0.55, 0.19: 1, 0.2: 1, 0.6: 0.55, 1: 0.1}),
        ("wsd", 0.0, 0.4, {0: 1, 0.3: 1, 0.6: 1, 0.7: 0.75, 0.8: 0.5, 0.9: 0.25, 1: 0}),
        ("wsd", 0.1, 0.5, {0: 0.1, 0.04: 0.5, 0.1: 1, 0.5: 1, 0.75: 0.5, 0.95: 0.1, 1: 0}),
        ("wsd", 0.0, 1.0, {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
    ],
)
def test_rates_are_those_of_the_table(
    schedule: str, warmup: float, decay: float, expected: dict[float, float]
) -> None:
    """Each update takes a hundredth of the run; the table's keys are the share before it."""
    for before, rate in expected.items():
        found = learning_rate(before, before + 0.01, 2e-3, schedule, warmup, decay)
        assert found == pytest.approx(2e-3 * rate), before


def test_the_default_is_minimind_s_rate() -> None:
    for done in range(11):
        expected = 5e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * done / 10)))
        assert learning_rate(done / 10, (done + 1) / 10, 5e-4) == pytest.approx(expected)


# ------------------------------------------------------------------------ the next optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_optimizer_leaves_out_an_update_that_is_not_finite(kind: str) -> None:
    assert skips_bad_updates(OPTIMIZERS[kind])


@pytest.mark.parametrize(
    "build",
    [
        lambda model, lr, *_: torch.optim.NAdam(model.parameters(), lr),
        lambda model, lr, *_: torch.optim.RMSprop(model.parameters(), lr),
        lambda model, lr, *_: torch.optim.AdamW(model.parameters(), lr, fused=False),
        lambda model, lr, *_: torch.optim.Adafactor(model.parameters(), lr),
        lambda model, lr, *_: torch.optim.SGD(model.parameters(), lr, fused=False),
        lambda model, lr, *_: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr),
    ],
    ids=["nadam", "rmsprop", "plain adamw", "adafactor", "plain sgd", "torch's muon"],
)
def test_one_that_would_apply_it_is_refused_when_it_is_built(
    monkeypatch: pytest.MonkeyPatch, build: object
) -> None:
    """What torch offers and does not look at found_inf: it would end with NaN in all weights."""
    monkeypatch.setitem(optimizers.OPTIMIZERS, "next", build)
    with pytest.raises(ValueError, match="--optimizer next ignores found_inf"):
        build_optimizer(torch.nn.Linear(4, 4), 1e-3, "next")


def test_trying_an_optimizer_draws_nothing_from_the_run_s_generator() -> None:
    skips_bad_updates.cache_clear()
    model, before = tiny_model(), torch.get_rng_state()
    for kind in OPTIMIZERS:
        build_optimizer(model, 1e-3, kind)
    assert torch.equal(torch.get_rng_state(), before)
