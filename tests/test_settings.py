"""What must match on resume, and what may change."""

import json
import re
import shutil
from pathlib import Path

import pytest

import train_dpo
import train_full_sft
import train_pretrain
from tests import launched
from tests.helpers import ROOT
from tests.running import assert_same, newest_state, tiny_flags, write_corpus
from trainer.checkpoint import list_states, read_state, save_state
from trainer.command_line import parse_flags
from trainer.flags import DECIDES, SPLITS, config_type
from trainer.saved_settings import flag_names

# Another value of each flag that must match, none of which the others' values depend on.
OTHER = {
    "epochs": 3,
    "learning_rate": 2e-3,
    "grad_clip": 0.5,
    "dropout": 0.2,
    "seed": 7,
    "dtype": "bfloat16",
    "residual_dtype": "bfloat16",
    "from_weight": "base",
    "max_seq_len": 16,
    "packing": 0,
    "heldout_fraction": 0.2,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "use_moe": 1,
    "optimizer": "muon",
    "tie_word_embeddings": 0,
    "embedding_init": "bigrams",
    "look_back_heads": 2,
    "embedding_lr_scale": 12.0,
    "head_lr_scale": 2.0,
    "vector_lr_scale": 4.0,
    "adam_beta1": 0.8,
    "adam_beta2": 0.98,
    "muon_momentum": 0.9,
    "muon_beta2": 0.95,
    "muon_period": 2,
    "weight_decay": 0.8,
    "lr_schedule": "wsd",
    "warmup_ratio": 0.1,
    "decay_ratio": 0.3,
}
UNTIED = {"tie_word_embeddings": 0}
ALONG = {  # what their other values need
    "embedding_init": UNTIED,
    "look_back_heads": UNTIED | {"embedding_init": "bigrams"},
}
NAMED = {"hidden_size", "use_moe"}  # they are part of the files' names: another run's files


def test_there_is_another_value_of_each_flag_that_must_match() -> None:
    assert OTHER.keys() == set(flag_names(DECIDES))


def test_the_docs_name_each_flag_that_must_match_and_each_that_splits() -> None:
    page = (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8")
    section = page.partition("## What must match")[2].partition("\n## ")[0]
    must, may = section.split("\n\n")[1:3]
    programs = map(config_type, (train_dpo.DPO, train_full_sft.FULL_SFT))
    deciding = {name for program in programs for name in flag_names(DECIDES, program)}
    assert set(re.findall(r"`--(\w+)`", must)) == deciding
    assert deciding - set(flag_names(DECIDES)) == {
        "beta",
        "sft_weight",
        "system_share",
        "empty_thinking",
    }
    assert set(re.findall(r"`--(\w+)`", may)) == set(flag_names(SPLITS))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed half-way."""
    folder = tmp_path_factory.mktemp("half")
    words = tiny_flags(folder, dropout=0.1)
    death = [("die_in_update", {"step": 13, "how": "SIGKILL"})]
    assert launched.run_trainers(words, folder / "log", faults=death) == [-9]
    return folder


def again(half: Path, folder: Path, **changes: object) -> tuple[int, str]:
    """Go on in a copy, with changes. Returns the exit status and what it printed."""
    copy = folder / "copy"
    shutil.copytree(half, copy, dirs_exist_ok=True)
    log = folder / "log"
    words = tiny_flags(copy, **{"dropout": 0.1, "from_resume": 1} | changes)
    return launched.run_trainers(words, log)[0], log.read_text()


@pytest.mark.parametrize("name", sorted(OTHER.keys() - NAMED))
def test_a_setting_that_decides_what_is_learnt_must_match(
    half: Path, tmp_path: Path, name: str
) -> None:
    before = {p.name: p.read_bytes() for p in (half / "checkpoints").glob("*_resume_*")}
    status, log = again(half, tmp_path, **{name: OTHER[name]} | ALONG.get(name, {}))
    assert status == 2, log
    rows = [line.split() for line in log.splitlines() if line.split()[:1] == [name]]
    saved = vars(parse_flags(tiny_flags(half, dropout=0.1)))[name]
    assert rows == [[name, str(saved), str(OTHER[name])]]
    after = {p.name: p.read_bytes() for p in (tmp_path / "copy/checkpoints").glob("*_resume_*")}
    assert after == before


@pytest.mark.parametrize(
    "changes",
    [
        {"log_interval": 3, "save_interval": 2, "eval_interval": 4, "eval_tokens": 99},
        {
            "num_workers": 2,
            "timeout": 77,
            "keep_states": 5,
            "max_bad_updates": 1,
            "price_per_hour": 2.5,
        },
        {
            "preset": "demo",
            "warmup_ratio": 0,
            "optimizer": "adamw",
            "lr_schedule": "cosine",
            "decay_ratio": 0.4,
            "bad_records": "skip",
            "wandb_project": "other",
            "overwrite": 0,
        },  # the preset's own recipe would change the run
    ],
)
def test_settings_that_may_change_change_nothing_that_is_learnt(
    half: Path, tmp_path: Path, changes: dict
) -> None:
    (tmp_path / "reference").mkdir()
    assert again(half, tmp_path / "reference")[0] == 0
    status, log = again(half, tmp_path, **changes)
    assert status == 0, log
    assert "except for rounding" not in log
    found = newest_state(tmp_path / "copy")
    expected = newest_state(tmp_path / "reference" / "copy")
    for part in ("model", "optimizer", "rng"):
        assert_same(found[part], expected[part], part)


def test_another_split_of_the_update_keeps_its_rows_and_says_that_rounding_changes(
    half: Path, tmp_path: Path
) -> None:
    status, log = again(half, tmp_path, batch_size=4)
    assert status == 0, log
    changed = "batch_size 2 (now 4), micro_batch_size 2 (now 4)"
    assert f"note: saved with {changed}: the same run except for rounding" in log
    assert "updates of 8 rows" in log


def test_another_product_is_refused(half: Path, tmp_path: Path) -> None:
    status, log = again(half, tmp_path, accumulation_steps=2)
    assert status == 2 and "rows per update  8      4" in log


@pytest.mark.parametrize("change", ["append", "edit", "reorder", "tokenizer"])
def test_changed_data_or_tokenizer_is_refused(half: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(half, tmp_path / "copy")
    corpus, changes = tmp_path / "copy" / "corpus.jsonl", {}
    lines = corpus.read_text().splitlines()
    if change == "append":
        lines.append('{"text": "one more"}')
    elif change == "edit":
        lines[40] = lines[40].replace("word", "werd", 1)
    elif change == "reorder":
        lines[3], lines[4] = lines[4], lines[3]
    corpus.write_text("\n".join(lines) + "\n")
    if change == "tokenizer":
        shutil.copytree("model", tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.py*"))
        rules = tmp_path / "tokenizer" / "tokenizer.json"
        content = json.loads(rules.read_text(encoding="utf-8"))
        first, second = content["model"]["merges"][-2:]
        content["model"]["merges"][-2:] = [second, first]
        rules.write_text(json.dumps(content), encoding="utf-8")
        changes = {"tokenizer_path": tmp_path / "tokenizer"}
    log = tmp_path / "log"
    words = tiny_flags(tmp_path / "copy", dropout=0.1, from_resume=1, **changes)
    assert launched.run_trainers(words, log) == [2], log.read_text()
    path = "tokenizer_path" if change == "tokenizer" else "data_path"
    assert f"content of {path}" in log.read_text()


def test_the_same_data_under_another_name_is_the_same(half: Path, tmp_path: Path) -> None:
    moved = write_corpus(tmp_path / "moved.jsonl")
    status, log = again(half, tmp_path, data_path=moved, cache_dir=tmp_path / "elsewhere")
    assert status == 0, log


def test_another_version_of_torch_is_told(half: Path, tmp_path: Path) -> None:
    """A state of another machine: everything is as it was but what decides the last bits."""
    folder = tmp_path / "copy" / "checkpoints"
    shutil.copytree(half, tmp_path / "copy")
    state = read_state(list_states(folder, "pretrain_32")[0])
    state["rounding"] |= {"torch": "2.11.0", "threads": "16"}
    save_state(folder, "pretrain_32", state["step"], state)
    status, log = (
        launched.run_trainers(
            tiny_flags(tmp_path / "copy", dropout=0.1, from_resume=1), tmp_path / "log"
        )[0],
        (tmp_path / "log").read_text(),
    )
    assert status == 0, log
    assert "note: saved with torch 2.11.0 (now " in log and "threads 16 (now 1)" in log


def test_going_back_needs_resume_and_a_range_needs_two_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, expected in (
        ({"resume_step": 5}, ["--resume_step is given, but --from_resume is 0"]),
        ({"skip_steps": "9"}, ["--skip_steps is '9', expected FIRST:END"]),
        ({"skip_steps": "9:3"}, ["--skip_steps is '9:3'"]),
        ({"save_weight": "a/b"}, ["--save_weight is 'a/b', expected a name"]),
        ({"save_weight": "*"}, ["--save_weight is '*', expected a name"]),
        ({"max_bad_updates": -1}, ["--max_bad_updates is -1"]),
        ({"timeout": 0, "keep_states": 0}, ["--timeout is 0", "--keep_states is 0"]),
    ):
        assert train_pretrain.main(tiny_flags(tmp_path, **changes)) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in expected), error
