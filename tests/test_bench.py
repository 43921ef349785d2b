"""The programs that measure: each variant really runs, on a model that takes seconds."""

import json
import math
import sys
from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import train_pretrain
from bench import compare_recipes, fine_tuning, growth, try_variants
from bench.benchmark import (
    PADDED,
    LoopingExperts,
    Padded,
    Variant,
    looping_experts,
    muon_in_a_loop,
    padded_flags,
    plain_adamw,
    table,
    train_variant,
    variants,
)
from bench.compare_recipes import Watch
from bench.measuring import OURS, NoGuard, train
from bench.products import InTurn
from dataset.lm_dataset import PretrainDataset
from model.generation import build_qwen
from tests.helpers import ROOT, shipped_tokenizer, tiny_model, write_jsonl
from tests.running import read_metrics, short_documents, tiny_flags, train_in_process
from trainer.optimizer import Tuning, build_optimizer, step_if_finite

SMALL = {
    "max_seq_len": 32,
    "batch_size": 2,
    "accumulation_steps": 2,
    "micro_batch_size": 2,
    "num_workers": 0,
}
COMPILES = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the compiler's own warnings
VARIANTS = {  # those for CUDA run on a CPU as well
    f"{variant.name}, {'moe' if use_moe else 'dense'}": (variant, use_moe)
    for use_moe in (False, True)
    for on_cuda in (True, False)
    for variant in variants(on_cuda, use_moe)
}


class Pipe:
    """The parent of a variant: lets it take two turns of one update each, then ends it."""

    def __init__(self) -> None:
        self.heard: list[dict] = []

    def send(self, said: dict) -> None:
        self.heard.append(said)

    def recv(self) -> float | None:
        return 0.0 if len(self.heard) < 3 else None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=COMPILES if "compiled" in name else []) for name in VARIANTS]
)
def test_each_variant_of_the_benchmark_takes_turns(tmp_path: Path, name: str) -> None:
    variant, use_moe = VARIANTS[name]
    given = {"use_compile": 0} | variant.flags | SMALL
    given |= {"use_moe": int(use_moe), "heldout_fraction": 0, "epochs": 100}
    pipe = Pipe()
    with pytest.raises(SystemExit) as end:
        train_variant(pipe, variant, tiny_flags(tmp_path, **given), since=0.0)
    assert not end.value.code
    first, *turns = pipe.heard
    assert first["first"] > first["first_step"] > 0 and first["flops"] > 0
    assert len(turns) == 2
    for turn in turns:
        assert 0 < turn["tokens"] <= turn["positions"] == 4 * 32
        assert 0 < turn["waited"] < turn["seconds"]
    result = first | {"name": name, "turns": turns, "cold": True, "memory": turns[0]["memory"]}
    assert f"| {name} | " in table(Namespace(device="cpu"), [result]).splitlines()[-1]


def test_a_variant_that_fails_says_so_by_its_status(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        train_variant(Pipe(), Variant("ours"), tiny_flags(tmp_path, learning_rate=-1), since=0.0)
    assert end.value.code == 2


def test_products_of_an_update_are_three_for_each_matrix(tmp_path: Path) -> None:
    """Forward, gradient of the input, gradient of the weights: 6 operations a token and weight."""
    guard = InTurn(turns=2)
    with pytest.raises(SystemExit) as end:
        train(tiny_flags(tmp_path, **SMALL), guard, OURS._replace(step=guard.step))
    assert not end.value.code
    weights = {name: p for name, p in guard.run.model.named_parameters() if p.dim() == 2}
    tokens = SMALL["max_seq_len"] * SMALL["batch_size"] * SMALL["accumulation_steps"]
    assert guard.recorder.num_flops() == 6 * tokens * sum(p.numel() for p in weights.values())
    assert all(0 < products < 1 and update > 0 for update, products in guard.seconds)


# ------------------------------------------------------------------ what a variant changes, alone


def test_experts_in_a_loop_compute_what_stacked_ones_do() -> None:
    model = tiny_model(use_moe=True)
    ids = torch.randint(3, 96, (2, 16))
    expected = model(ids, labels=ids)
    weights = [*model.parameters()]
    looping_experts(SimpleNamespace(model=model, config=model.config))
    assert all(isinstance(layer.mlp, LoopingExperts) for layer in model.model.layers)
    assert {*map(id, weights)} == {*map(id, model.parameters())}
    found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    assert found.expert_load.equal(expected.expert_load)


@pytest.mark.parametrize(("kind", "change"), [("adamw", plain_adamw), ("muon", muon_in_a_loop)])
def test_an_optimizer_in_a_loop_moves_weights_as_ours_does(kind: str, change: object) -> None:
    ours = tiny_model()
    theirs = deepcopy(ours)
    runs = [
        SimpleNamespace(model=model, optimizer=build_optimizer(model, 1e-2, kind, torch.float32))
        for model in (ours, theirs)
    ]
    change(runs[1])
    assert type(runs[1].optimizer) is not type(runs[0].optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for seed in range(3):
        for run in runs:
            torch.manual_seed(seed)
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-2
            for parameter in run.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            step_if_finite(run.optimizer, scaler, torch.zeros(1), torch.ones(()))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-2)  # torch's Muon is of bfloat16


def test_padded_rows_are_those_that_the_trainer_pads_but_for_what_is_cut(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*short_documents(20), "long " * 200])
    sets = [
        kind([str(corpus)], shipped_tokenizer(), 128, packing=False, cache_dir=str(tmp_path))
        for kind in (Padded, PretrainDataset)
    ]
    rows = [*range(22)]  # the last is past the end: all padding
    padded, own = (data.__getitems__(rows) for data in sets)
    is_cut = own.input_ids[:, -1] > 2
    assert is_cut.sum() == 1
    assert padded.input_ids[~is_cut].equal(own.input_ids[~is_cut])
    assert padded.input_ids[is_cut, :-1].equal(own.input_ids[is_cut, :-1])
    assert padded.input_ids[is_cut, -1] == sets[0].eos, "and ends nevertheless"
    assert padded.labels[:, 1:].equal(
        padded.input_ids.masked_fill(padded.input_ids == sets[0].pad, -100)[:, 1:]
    )


@pytest.mark.parametrize("use_moe", [0, 1])
def test_the_padded_recipe_draws_all_matrices_as_minimind_does(
    tmp_path: Path, use_moe: int
) -> None:
    drawn = []

    class Guard(NoGuard):
        def begin(self, run: object, state: None, num_bad_records: int) -> bool:
            drawn.extend(w.std().item() for w in run.model.parameters() if w.ndim > 1)
            return False

    given = padded_flags(on_cuda=False) | SMALL | {"use_moe": use_moe, "num_hidden_layers": 1}
    train(tiny_flags(tmp_path, **given), Guard(), PADDED)
    assert len(drawn) == 1 + 4 + (4 if use_moe else 3)
    assert all(0.015 < deviation < 0.025 for deviation in drawn)


# ---------------------------------------------------------------------------- the other programs


def test_what_measures_trains_as_the_program_does(tmp_path: Path) -> None:
    """The same held-out score, to the last bit; and each variant of the recipe runs."""
    given = {"num_hidden_layers": 1, "epochs": 1, "use_moe": 1, "save_interval": 10**9}
    train_in_process(tmp_path, **given)
    (score,) = (r["heldout_bits_per_byte"] for r in read_metrics(tmp_path) if "heldout_loss" in r)
    scores = {}
    for variant in (try_variants.AS_IT_IS, *try_variants.VARIANTS):
        pipe = Pipe()
        try_variants.child(pipe, variant, tiny_flags(tmp_path / "variants", **given))
        scores[variant] = pipe.heard[0]["bits_per_byte"]
        assert pipe.heard[0]["updates"] == read_metrics(tmp_path)[-1]["step"]
    assert scores[try_variants.AS_IT_IS] == score
    for variant in (*try_variants.CHANGES, "--grad_clip 0.3"):
        assert scores[variant] != score, variant


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Of documents that are long enough to be scored."""
    documents = [" ".join(short_documents(60)[i:] + short_documents(60)[:i]) for i in range(60)]
    return write_jsonl(tmp_path / "corpus.jsonl", documents)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "intermediate_size": 16}
TINY |= {"batch_size": 2, "accumulation_steps": 1, "micro_batch_size": 2}


@pytest.mark.parametrize("name", compare_recipes.recipes(on_cuda=False))
def test_a_trial_sees_the_tokens_it_is_given_and_is_scored_as_documents_are(
    tmp_path: Path, corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored by another way: one document after another, by transformers."""
    watches = []
    monkeypatch.setattr(
        compare_recipes, "Watch", lambda *given: watches.append(Watch(*given)) or watches[-1]
    )
    tokenizer = AutoTokenizer.from_pretrained("model")
    compare_recipes.split(corpus, tmp_path)
    flags = compare_recipes.recipes(on_cuda=False)[name].flags | TINY
    trial = compare_recipes.Trial(name, flags, 3000, 1)
    args = Namespace(device="cpu", preset="demo")
    found = compare_recipes.run_trial(trial, args, tmp_path)
    longest = 340 if name == "MiniMind, padded" else 1000  # of a document, here
    assert 3000 <= found["tokens"] + found["updates"] * 4 < 3000 + 2 * longest
    (watch,) = watches
    qwen = build_qwen(watch.run.model)
    lines = (tmp_path / "kept_aside.jsonl").read_text().splitlines()
    nats = num_bytes = 0
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"][:338]
        assert len(ids) == 338
        row = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            nats += qwen(row, labels=row).loss.item() * 338
        num_bytes += len(tokenizer.decode(ids).encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


def test_a_trial_that_diverges_is_as_bad_as_can_be_and_ends_no_contest(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its initial weights are so large that the first loss is not finite."""
    compare_recipes.split(corpus, tmp_path)
    flags = compare_recipes.recipes(on_cuda=False)["AdamW, packed"].flags | TINY
    flags |= {"max_bad_updates": 0}
    build = train_pretrain.init_model

    def overflowing(*args: object) -> tuple:
        model, tokenizer = build(*args)
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.inf)
        return model, tokenizer

    monkeypatch.setattr(train_pretrain, "init_model", overflowing)
    args = Namespace(device="cpu", preset="demo")
    trial = compare_recipes.Trial("AdamW, packed", flags, 9000, 1)
    assert compare_recipes.run_trial(trial, args, tmp_path)["bits_per_byte"] == math.inf


def test_torch_s_muon_has_torch_s_defaults() -> None:
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build_optimizer(
        ours, 1e-3, "muon", torch.float32, Tuning(12.0, 1.0, 4.0, 0.5, 0.9, 0.8)
    )
    run = SimpleNamespace(optimizer=optimizer)
    compare_recipes.torch_s_muon(run)
    named = dict(theirs.named_parameters())
    hidden = [p for n, p in named.items() if ".layers." in n and p.ndim == 2]
    rest = [p for n, p in named.items() if not (".layers." in n and p.ndim == 2)]
    reference = [torch.optim.Muon(hidden), torch.optim.AdamW(rest)]
    for seed in range(3):
        torch.manual_seed(seed)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for each in (run.optimizer, *reference):
            each.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_growth_measures_an_update() -> None:
    found = growth.update_cost(batch_size=2, hidden_size=32, length=16, device="cpu")
    assert found["microseconds a token"] == pytest.approx(found["milliseconds"] / 32 * 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "arguments"), [("corpus", {"num_documents": 1000}), ("exchange", {"num_ranks": 2})]
)
def test_growth_measures_a_corpus_and_an_exchange(what: str, arguments: dict) -> None:
    assert all(value >= 0 for value in growth.measured(what, **arguments).values())


@pytest.mark.slow
def test_what_fails_in_a_process_of_its_own_is_named() -> None:
    with pytest.raises(SystemExit, match="corpus: failed"):
        growth.measured("corpus", num_documents="none")


def test_fine_tuning_counts_the_labels_of_an_update(tmp_path: Path) -> None:
    data = ROOT / "dataset" / "chat_sample.jsonl"
    args = Namespace(data_path=data, rows=4, length=64, updates=8, dtype="float32")
    ends, useful = fine_tuning.ours(args, tmp_path)
    assert len(ends) == 8 and ends == sorted(ends)
    (metrics,) = (tmp_path / "save_dir").glob("*_metrics.jsonl")
    logged = [json.loads(line)["tokens"] for line in metrics.read_text().splitlines()]
    assert logged[7] / 8 == pytest.approx(useful, rel=0.2)
    folder = tmp_path / "cache"
    whole = fine_tuning.labels_of(data, "model", None, folder)
    assert 0 < fine_tuning.labels_of(data, "model", 30, folder) < whole


def test_a_program_that_makes_too_few_updates_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('update')"]
    with pytest.raises(SystemExit, match="made 1 updates, expected over 6"):
        fine_tuning.ends_of_updates(command, tmp_path, "update", 9)
