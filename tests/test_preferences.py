"""train_dpo.py: pairs, their loss against TRL and a formula, and the guarantees of the loop."""

import contextlib
import io
import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import train_dpo
from dataset.chat_datasets import DPODataset, PreferenceBatch, SFTDataset
from dataset.conversations import written_out
from dataset.lm_dataset import IGNORE
from dataset.preferences import pair_content
from dataset.records import DataError
from model.model_minimind import nats_of_each
from scripts import prepare_data
from tests.helpers import ROOT, shipped_tokenizer
from tests.running import (
    assert_same,
    metrics_without_times,
    newest_state,
    read_metrics,
    run_command,
    tiny_flags,
    train_and_kill,
    training_command,
)
from tests.test_conversations import minimind_s_classes, some_conversations, write
from tests.test_fine_tuning import fine_tune
from tests.trl_reference import (
    BETA,
    GOLDEN,
    LENGTH,
    WEIGHT,
    by_trl,
    models,
    pair,
    pairs_in_rows,
    some_pairs,
    turn,
)
from trainer.command_line import parse_flags
from trainer.preferences import MEASURES, log_probabilities, preference_loss

NAME = "dpo_32"
ASKED = [turn("user", "Why?")]


def texts(number: int) -> list[list[int]]:
    """The ids of both conversations of a pair, each written out and tokenized by itself."""
    tokenizer, record = shipped_tokenizer(), some_pairs()[number]
    written = [written_out(tokenizer, record[name], None) for name in ("chosen", "rejected")]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]


def ours(folder: Path, weight: float, **choice: object) -> dict:
    """As ``by_trl``."""
    policy, reference = models()
    data = pairs_in_rows(folder, **choice)
    args = parse_flags(["--dtype", "float32", "--device", "cpu"], program=train_dpo.DPO)
    scores = log_probabilities(reference, data.of_all_pairs(512), args, data.reference)
    data.reference.copy_(scores)
    batch = data.__getitems__([*range(len(data))])
    policy.next_token_nats = nats_of_each
    out = preference_loss(policy, batch, beta=BETA, sft_weight=weight)
    out.loss.backward()
    named = policy.named_parameters()
    return {
        "loss": out.loss.item(),
        **{name: getattr(out, name).item() for name in MEASURES},
        "gradients": {name: p.grad.norm().item() for name, p in named if p.grad is not None},
    }


# --------------------------------------------------------------------------------------- the loss


def same_as_trl(found: dict, expected: dict) -> None:
    for name in ("loss", *MEASURES):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    gradients = expected["gradients"]
    assert found["gradients"].keys() == gradients.keys()
    for name, norm in gradients.items():
        assert found["gradients"][name] == pytest.approx(norm, rel=1e-5), name


@pytest.mark.parametrize("choice", [{}, {"packing": False}, {"seed": 3}])
def test_loss_gradient_and_metrics_are_trl_s(tmp_path: Path, choice: dict) -> None:
    """As recorded; python -m tests.trl_reference records it again."""
    expected = json.loads(GOLDEN.read_text())["weight 0.0"]
    assert expected["margin"] != 0 and 0 < expected["accuracy"] < 1
    same_as_trl(ours(tmp_path, 0.0, **choice), expected)


@pytest.mark.filterwarnings("ignore")  # of TRL's own
@pytest.mark.parametrize("weight", [0.0, WEIGHT])
def test_trl_itself_gives_what_was_recorded(tmp_path: Path, weight: float) -> None:
    """pip install trl datasets."""
    pytest.importorskip("trl")
    same_as_trl(by_trl(tmp_path, weight), json.loads(GOLDEN.read_text())[f"weight {weight}"])


def test_the_cross_entropy_is_the_mean_over_each_chosen_answer_s_tokens(tmp_path: Path) -> None:
    """TRL's averages over the tokens of all answers, and depends on how they share batches."""
    policy, _ = models()
    found = ours(tmp_path, WEIGHT)["loss"] - ours(tmp_path, 0.0)["loss"]
    means = []
    for number, record in enumerate(some_pairs()):
        ids = texts(number)[0]
        answer = f"{record['chosen'][-1]['content']}<|im_end|>\n"
        num = len(shipped_tokenizer()(answer, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            scores = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = torch.arange(len(ids) - num, len(ids))
        means.append(-scores[places - 1, torch.tensor(ids)[places]].mean())
    assert found == pytest.approx(WEIGHT * float(sum(means)) / len(means), rel=1e-4)


def test_a_policy_that_is_its_reference_has_the_loss_ln_2(tmp_path: Path) -> None:
    policy, _ = models()
    data = pairs_in_rows(tmp_path)
    args = parse_flags(["--dtype", "float32", "--device", "cpu"], program=train_dpo.DPO)
    data.reference.copy_(log_probabilities(policy, data.of_all_pairs(1), args, data.reference))
    out = preference_loss(policy, data.__getitems__([0]), beta=BETA)
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert out.margin.abs().item() < 1e-5


# ------------------------------------------------------------------------------------------- rows


def answers_of(batch: PreferenceBatch) -> list[list[list[int]]]:
    """The tokens of both conversations of each pair, as they stand in the rows."""
    flat = batch.rows.input_ids.flatten()
    return [
        [flat[b : b + n].tolist() for b, n in zip(*pair, strict=True)]
        for pair in zip(batch.first.tolist(), batch.length.tolist(), strict=True)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_holds_both_conversations_of_its_pairs(tmp_path: Path, packing: bool) -> None:
    data = pairs_in_rows(tmp_path, packing=packing)
    batch = data.__getitems__([*range(len(data)), len(data)])  # the last one is padding
    assert batch.num_labels == 5 and len(data) == (4 if packing else 5)
    for number, found in zip(batch.pair.tolist(), answers_of(batch), strict=True):
        assert found == texts(number)
    starts = batch.rows.document_starts
    for (row, at), length in zip(
        [divmod(b, 2 * LENGTH) for b in batch.first.flatten().tolist()],
        batch.length.flatten().tolist(),
        strict=True,
    ):
        assert (starts[row, at : at + length] == at).all()
    assert (starts >= 0).sum() == batch.length.sum()
    assert (batch.rows.input_ids[starts < 0] == 0).all()
    assert batch.rows.max_documents >= 10


def test_only_answers_after_the_prompt_are_learned(tmp_path: Path) -> None:
    data = pairs_in_rows(tmp_path)
    tokenizer = shipped_tokenizer()
    batch = data.__getitems__([*range(len(data))])
    labels = batch.rows.labels.flatten()
    for number, first, length in zip(batch.pair, batch.first, batch.length, strict=True):
        for name, begin, num in zip(("chosen", "rejected"), first, length, strict=True):
            learned = labels[begin : begin + num]
            text = tokenizer.decode(learned[learned != IGNORE])
            answer = some_pairs()[int(number)][name][-1]["content"]
            assert text == f"{answer}<|im_end|>\n"


def test_a_pair_is_cut_at_the_end_of_each_conversation(tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", [pair(ASKED, "yes " * 80, "no"), *some_pairs()])
    cut = DPODataset(str(path), shipped_tokenizer(), 40, cache_dir=str(tmp_path / "cache"))
    assert cut.num_cut == 1 + sum(max(map(len, texts(n))) > 40 for n in range(5))
    batch = cut.__getitems__([*range(len(cut))])
    number = batch.pair.tolist().index(0)
    assert batch.length[number, 0] == 40
    both = (pair(ASKED, "yes " * 80, "no")[name] for name in ("chosen", "rejected"))
    written = (written_out(shipped_tokenizer(), turns, None) for turns in both)
    whole = [shipped_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in written]
    assert answers_of(batch)[number] == [whole[0][:40], whole[1]]


def test_epochs_change_the_order_of_rows_and_nothing_else(tmp_path: Path) -> None:
    data = pairs_in_rows(tmp_path, packing=False)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        batch = data.__getitems__([*range(len(data))])
        assert [texts(n) for n in batch.pair.tolist()] == answers_of(batch)
        assert data.documents_of([1]) == [int(batch.pair[1])]
        orders.append(batch.pair.tolist())
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.skipif("MINIMIND" not in os.environ, reason="MINIMIND names no checkout of MiniMind")
def test_ids_are_those_of_minimind_s_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MINIMIND=/path/to/minimind pytest tests/test_preferences.py; it also learns earlier answers,
    whose log-probabilities cancel in the margin."""
    pytest.importorskip("datasets")
    root, theirs = minimind_s_classes()
    monkeypatch.setattr(theirs, "post_processing_chat", lambda text: text)
    path = write(tmp_path / "pairs.jsonl", some_pairs())
    tokenizer = AutoTokenizer.from_pretrained(str(root / "model"))
    expected = theirs.DPODataset(str(path), tokenizer, 128)
    data = DPODataset(str(path), tokenizer, 128, cache_dir=str(tmp_path / "cache"))
    batch = data.__getitems__([*range(len(data))])
    flat = batch.rows.labels.flatten()
    for number, ids, first in zip(batch.pair, answers_of(batch), batch.first, strict=True):
        one = expected[int(number)]
        for name, found, begin in zip(("chosen", "rejected"), ids, first, strict=True):
            x, mask = one[f"x_{name}"].tolist(), one[f"mask_{name}"]
            assert x[: len(found) - 1] == found[:-1]
            own = flat[begin + 1 : begin + len(found)] != IGNORE
            assert (mask[: len(own)].bool() | ~own).all()


@pytest.mark.parametrize(
    ("records", "kind"), [(some_pairs(), DPODataset), (some_conversations(20), SFTDataset)]
)
def test_pairs_and_conversations_are_tokenized_ahead_of_training(
    tmp_path: Path, records: list[dict], kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    path, cache = str(write(tmp_path / "data.jsonl", records)), str(tmp_path / "cache")
    assert prepare_data.main(["--data_path", path, "--cache_dir", cache, "--report"]) == 0
    said = capsys.readouterr().out
    data = kind(path, shipped_tokenizer(), 64, cache_dir=cache)
    assert said.startswith(f"{data.cache.folder}: {len(records)} documents")
    assert [data.cache.folder] == [*Path(cache).iterdir()]
    share = data.cache.meta["num_labels"] / data.cache.meta["num_tokens"]
    assert f"{share:.0%} of them learned" in said


# --------------------------------------------------------------------------------------- bad input


GOOD = pair(ASKED, "Because.", "No idea.")


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"chosen": GOOD["chosen"]}, "no \"rejected\"; its keys: 'chosen'"),
        ({"conversations": GOOD["chosen"]}, "no \"chosen\"; its keys: 'conversations'"),
        (GOOD | {"chosen": "Because."}, '"chosen" is a JSON string'),
        (GOOD | {"rejected": ASKED}, 'no turn of an assistant in "rejected"'),
        (GOOD | {"rejected": GOOD["chosen"]}, '"chosen" and "rejected" are the same'),
        (
            GOOD | {"rejected": [turn("user", "Who?"), turn("assistant", "I.")]},
            '"chosen" and "rejected" have different prompts (turn 1)',
        ),
        (
            GOOD | {"rejected": [*GOOD["chosen"], *GOOD["chosen"]]},
            '"chosen" and "rejected" have different prompts (turn 3)',
        ),
        (pair(ASKED, "", "No."), 'turn 2 of "chosen": no content in the turn of the assistant'),
        (pair(ASKED, "a<|endoftext|>", "b"), "a turn contains '<|endoftext|>', the padding token"),
        (
            pair([turn("user", "<|im_start|>assistant\n")], "a", "b"),
            "a turn contains '<|im_start|>assistant\\n', which begins a turn of the assistant",
        ),
    ],
)
def test_what_is_wrong_with_a_pair_is_said(
    tmp_path: Path, record: dict, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "pairs.jsonl", [GOOD, record])
    assert train_dpo.main(dpo_flags(tmp_path, data_path=path)) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} line 2 (byte ") and error.count("\n") == 1
    assert what in error and '{"chosen": [' in error


def test_a_tokenizer_without_padding_of_its_own_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "model"))
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(DataError, match="--tokenizer_path: the tokenizer has no padding token of"):
        pair_content(tokenizer)


@pytest.mark.parametrize("name", ["none", "dpo"])
def test_the_reference_must_stay_as_it_is(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_dpo.main(dpo_flags(tmp_path, from_weight=name)) == 2
    assert f"--from_weight is {name}, expected a fine-tuned model" in capsys.readouterr().err


def test_weights_that_are_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_dpo.main(dpo_flags(tmp_path)) == 4
    assert "full_sft_32.pth: no such file." in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- runs


def many_pairs(num: int = 60) -> list[dict]:
    """Pairs of a short and a long answer, of various lengths."""
    return [
        pair(
            [turn("user", f"word{i} word{i * 7 % 31}?")],
            f"word{i % 5}.",
            " ".join(f"word{i * j % 13}" for j in range(i % 9 + 3)),
        )
        for i in range(num)
    ]


def dpo_flags(folder: Path, **changes: object) -> list[str]:
    """As tiny_flags, on pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "pairs.jsonl"
    if not corpus.exists():
        write(corpus, many_pairs())
    own = {
        "data_path": corpus,
        "save_weight": "dpo",
        "from_weight": "full_sft",
        "max_seq_len": 64,
        "batch_size": 2,
        "accumulation_steps": 2,
        "save_interval": 3,
        "learning_rate": 3e-3,
        "packing": 0,
        "dropout": 0.1,
    }
    return tiny_flags(folder, **own | changes)


def optimize(folder: Path, **changes: object) -> str:
    """Run to the end in this process, which must succeed. Returns: what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert train_dpo.main(dpo_flags(folder, **changes)) == 0
    return output.getvalue()


command = partial(training_command, program="train_dpo.py")


def state(folder: Path) -> dict:
    return newest_state(folder, NAME)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model."""
    folder = tmp_path_factory.mktemp("start")
    fine_tune(folder, epochs=1)
    return folder


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = copy_of(start, tmp_path_factory.mktemp("whole"))
    said = optimize(folder)
    assert re.search(r"data: 60 pairs, .* held out", said)
    assert "begins as full_sft" in said and " pairs/s" in said
    assert "held out: loss 0." in said and ", accuracy " in said and ", margin " in said
    return folder


def copy_of(start: Path, folder: Path) -> Path:
    """A folder with the same fine-tuned model."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    for name in ("full_sft_32.pth", "full_sft_32.json"):
        (folder / "out" / name).write_bytes((start / "out" / name).read_bytes())
    return folder


def test_the_defaults_are_minimind_s() -> None:
    args = parse_flags([], program=train_dpo.DPO)
    found = (args.save_weight, args.from_weight, args.epochs, args.batch_size, args.learning_rate)
    assert found == ("dpo", "full_sft", 1, 4, 4e-8)
    assert (args.accumulation_steps, args.max_seq_len, args.beta) == (1, 1024, 0.15)
    assert (args.log_interval, args.save_interval) == (100, 100)
    assert args.data_path == ["dataset/dpo.jsonl"] and args.wandb_project == "MiniMind-DPO"
    demo = parse_flags(["--preset", "demo"], program=train_dpo.DPO)
    assert (demo.epochs, demo.data_path) == (1, ["dataset/preference_sample.jsonl"])
    assert len(Path(train_dpo.__file__).read_text().splitlines()) <= 110


def test_it_learns_to_prefer_and_says_how_sure_it_is(whole: Path) -> None:
    records = read_metrics(whole)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(0.6931, abs=0.02) and losses[-1] < 0.8 * losses[0]
    (last,) = [record for record in records if "continuations" in record]
    assert last["heldout_accuracy"] > 0.5 and last["heldout_margin"] > 0
    assert last["heldout_margin"] == pytest.approx(
        last["heldout_chosen_reward"] - last["heldout_rejected_reward"], abs=1e-5
    )
    assert "What is the capital of France?" in last["continuations"]
    described = json.loads((whole / "out" / f"{NAME}.json").read_text())
    assert described["run"]["settings"]["program"] == "dpo"
    assert described["run"]["settings"]["beta"] == 0.15
    assert described["run"]["pairs"] == 2 * (60 - held_out(whole))


def held_out(folder: Path) -> int:
    """Pairs."""
    data = DPODataset(
        str(folder / "pairs.jsonl"),
        shipped_tokenizer(),
        64,
        heldout_fraction=0.1,
        cache_dir=str(folder / "cache"),
    )
    return int(data.is_held_out.sum())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_resumes_to_the_last_bit(start: Path, tmp_path: Path, num_ranks: int) -> None:
    changes = {"accumulation_steps": 2 // num_ranks, "packing": 1}
    expected, cut = copy_of(start, tmp_path / "whole"), copy_of(start, tmp_path / "cut")
    done = run_command(command(dpo_flags(expected, **changes), num_ranks))
    assert done.returncode == 0, done.stderr
    train_and_kill(cut, 4, num_ranks, dpo_flags(cut, **changes), "train_dpo.py")
    done = run_command(command([*dpo_flags(cut, **changes), "--from_resume", "1"], num_ranks))
    assert done.returncode == 0, done.stderr
    for part in ("model", "optimizer", "rng", "progress"):
        assert_same(state(cut)[part], state(expected)[part], part)
    found, wanted = (metrics_without_times(folder) for folder in (cut, expected))
    assert found == wanted


@pytest.mark.parametrize(("num_ranks", "rows"), [(2, 3), (3, 2)])
def test_any_number_of_ranks_learns_the_same(
    start: Path, tmp_path: Path, num_ranks: int, rows: int
) -> None:
    one, several = copy_of(start, tmp_path / "one"), copy_of(start, tmp_path / "several")
    same = {"accumulation_steps": 1, "dropout": 0.0}
    optimize(one, **same, batch_size=6)
    done = run_command(command(dpo_flags(several, **same, batch_size=rows), num_ranks))
    assert done.returncode == 0, done.stderr
    pairs = zip(read_metrics(several), read_metrics(one), strict=True)
    for found, expected in pairs:
        for key in ("loss", "heldout_loss", "heldout_margin"):
            assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-4)


def test_the_reference_is_computed_once_and_again_for_other_weights(
    start: Path, tmp_path: Path
) -> None:
    folder = copy_of(start, tmp_path / "run")
    once = partial(optimize, folder, epochs=1, overwrite=1)
    scoring = "scoring 60 pairs with full_sft, the reference"
    assert scoring in once()
    assert scoring not in once(seed=7, learning_rate=1e-2)
    (path,) = (folder / "cache").glob("*.reference")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    said = once()
    assert scoring in said and f"{path} is damaged" in said
    assert scoring in once(max_seq_len=48)
    weights = folder / "out" / "full_sft_32.pth"
    saved = torch.load(weights, weights_only=True)
    saved["model.norm.weight"] = saved["model.norm.weight"] + 1
    torch.save(saved, weights)
    assert scoring in once()


def test_a_run_is_not_resumed_with_another_reference(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(start, tmp_path / "run")
    optimize(folder, epochs=1)
    weights = folder / "out" / "full_sft_32.pth"
    saved = torch.load(weights, weights_only=True)
    saved["model.norm.weight"] = saved["model.norm.weight"] + 1
    torch.save(saved, weights)
    assert train_dpo.main(dpo_flags(folder, epochs=1, from_resume=1)) == 2
    assert "content of from_weight" in capsys.readouterr().err
    assert train_dpo.main(dpo_flags(folder, epochs=1, from_resume=1, beta=0.3)) == 2
    assert re.search(r"beta +0\.15 +0\.3", capsys.readouterr().err)


def test_a_run_takes_the_reference_that_its_dry_run_made(start: Path, tmp_path: Path) -> None:
    folder = copy_of(start, tmp_path / "run")
    said = optimize(folder, dry_run=1)
    assert "dry run: " in said and "pairs" in said
    assert "scoring" not in optimize(folder, epochs=1)
