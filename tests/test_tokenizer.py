"""The bundled tokenizer, and the script that trains others."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dataset.records import DataError
from scripts import train_tokenizer
from scripts.train_tokenizer import find_texts, sample_texts, save, train
from tests.helpers import ROOT, shipped_tokenizer, start_python, write_jsonl
from trainer.errors import SettingsError
from trainer.trainer_utils import load_tokenizer

SCRIPT = ("-m", "scripts.train_tokenizer")


def test_the_shipped_tokenizer_has_minimind_ids() -> None:
    tokenizer = shipped_tokenizer()
    assert len(tokenizer) == 6400 and sorted(tokenizer.get_vocab().values()) == list(range(6400))
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == control
    assert [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token] == control
    assert tokenizer(control, add_special_tokens=False)["input_ids"] == [[0], [1], [2]]


def test_the_shipped_tokenizer_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("model").get_vocab() == shipped_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "text",
    [
        "  two spaces, \t a tab, a trailing one ",
        "Windows\r\nMac\rUnix\n\n\n",
        "".join(map(chr, range(32))) + "\x7f\x85\xa0\u200b\u2028\ufeff",
        "👩‍👩‍👧‍👦 🇨🇳 ☃️",
        "中文，日本語, 한국어, עברית, हिन्दी, Ελληνικά, é e\u0301",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    ],
    ids=["spaces", "line ends", "control", "emoji", "scripts", "far planes"],
)
def test_every_text_is_decoded_to_itself(text: str) -> None:
    tokenizer = shipped_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def digits_of(tokens: list[str]) -> list[str]:
    """The tokens that contain a digit."""
    return [token for token in tokens if any("0" <= letter <= "9" for letter in token)]


def test_digits_stay_single() -> None:
    text = "in 2048, 3.14159 and 100%"
    trained = train(iter([text] * 500), 400)  # enough to merge all that may be merged
    for tokens in (shipped_tokenizer().tokenize(text), trained.encode(text).tokens):
        assert digits_of(tokens) == list("2048314159100")


# ---------------------------------------------------------------------- what cannot be used


def changed(folder: Path, name: str = "tokenizer.json", **entries: object) -> Path:
    """A copy of the bundled tokenizer, with entries of one of its files replaced."""
    made = folder / "changed"
    made.mkdir()
    for file in (ROOT / "model").glob("*.j*"):
        shutil.copy(file, made)
    described = json.loads((made / name).read_text()) | entries
    (made / name).write_text(json.dumps(described))
    return made


def refused(folder: Path) -> str:
    """The one line with which it is."""
    with pytest.raises(SettingsError) as caught:
        load_tokenizer(str(folder))
    message = str(caught.value)
    assert message.startswith(f"--tokenizer_path {folder} ") and message.isprintable()
    assert len(message) < 300 + len(str(folder))
    return message


@pytest.mark.parametrize("content", ["[]", "null", "{}", "", "\0", "[" * 10**5, '{"a":' * 10**5])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_s_file_that_is_none_is_one_line(
    tmp_path: Path, name: str, content: str
) -> None:
    if (name, content) == ("tokenizer_config.json", "{}"):
        pytest.skip("usable: no entry is needed")
    folder = changed(tmp_path)
    (folder / name).write_text(content)
    assert " holds no tokenizer: " in refused(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = changed(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refused(folder).endswith(f" cannot be used: {name} is not a regular file.")


MODEL = json.loads((ROOT / "model" / "tokenizer.json").read_text())["model"]


@pytest.mark.parametrize(
    "entries",
    [
        {"model": None},
        {"model": {name: value for name, value in MODEL.items() if name != "vocab"}},
        {"model": MODEL | {"vocab": MODEL["vocab"] | {"a": -1}}},
        {"model": MODEL | {"vocab": MODEL["vocab"] | {"a": 2**33}}},
        {"model": MODEL | {"merges": [["absent one", "absent two"]]}},
        {"model": MODEL | {"continuing_subword_prefix": "a" * 5000}},
        {"normalizer": {"type": "Unknown"}},
        {"name": "tokenizer_config.json", "tokenizer_class": ["a list"]},
        {"name": "tokenizer_config.json", "eos_token": 5},
    ],
    ids=["null", "no vocabulary", "-1", "2^33", "merges", "panic", "normalizer", "class", "eos"],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, entries: dict) -> None:
    assert " holds no tokenizer: " in refused(changed(tmp_path, **entries))


@pytest.mark.parametrize("largest", [6_500, 70_000, 2**31 + 5, 2**32 - 1])
def test_a_gap_in_the_ids_is_found_before_the_corpus_is_tokenized(
    tmp_path: Path, largest: int
) -> None:
    entry = list(MODEL["vocab"])[5000]
    folder = changed(tmp_path, model=MODEL | {"vocab": MODEL["vocab"] | {entry: largest}})
    found = f"its largest id is {largest:,}, but it has 6,400 entries."
    message = refused(folder)
    # A release of transformers may not open the largest at all.
    opened = largest < 2**32 - 1 or " holds no tokenizer: " not in message
    assert not opened or message.endswith(f" cannot be used: {found}")


def test_a_tokenizer_that_draws_at_random_is_refused(tmp_path: Path) -> None:
    message = refused(changed(tmp_path, model=MODEL | {"dropout": 0.1}))
    assert "its dropout is 0.1, so that a text's ids change each time" in message


@pytest.mark.parametrize("name", ["absent", "owner/absent", "./absent", "README.md"])
def test_a_name_that_is_no_folder_is_not_looked_up_on_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("asked"))
    assert "no such folder. For one from a hub, download it first: hf download" in refused(name)


@pytest.mark.parametrize("program", ["train_pretrain", "eval_llm", "scripts.export"])
def test_code_in_a_tokenizer_s_folder_is_not_run_whatever_standard_input_says(
    tmp_path: Path, program: str
) -> None:
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    folder, marker = changed(tmp_path, "tokenizer_config.json", **own), tmp_path / "marker"
    code = "from transformers import PreTrainedTokenizerFast as Own"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n{code}\n")
    words = ["--tokenizer_path", folder]
    if program == "train_pretrain":
        words += ["--device", "cpu", "--data_path", write_jsonl(tmp_path / "a.jsonl", ["a"])]
        words += [f"--{name}={tmp_path}" for name in ("save_dir", "checkpoint_dir", "cache_dir")]
    elif program == "scripts.export":
        words += ["--to", "hf", "--output", tmp_path / "output"]
    with start_python("-m", program, *words) as process:
        _, complaint = process.communicate("y\n" * 9, timeout=60)
    assert process.returncode == 2 and not marker.exists(), complaint
    assert complaint.startswith(f"error: --tokenizer_path {folder} holds no tokenizer: ")
    assert complaint.count("\n") == 1


# ---------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """A text file, a JSONL file and a folder; and the tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("trained")
    inside = folder / "inside"
    inside.mkdir()
    (folder / "a.txt").write_text("glimmer\n" * 300, encoding="utf-8")
    (inside / "b.txt").write_text("pumpkin\n" * 300, encoding="utf-8")
    (inside / "c.bin").write_bytes(b"quasar\n" * 300)
    write_jsonl(inside / "d.jsonl", ["zeppelin"] * 300)
    sources = [folder / "a.txt", write_jsonl(folder / "e.jsonl", ["walrus"] * 300), inside]
    words = ("--vocab_size", 400, "--output", folder / "out", "--data_path", *sources)
    with start_python(*SCRIPT, *words) as process:
        _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    return sources, folder / "out"


def test_the_script_reads_text_jsonl_and_folders(trained: tuple[list[Path], Path]) -> None:
    words = AutoTokenizer.from_pretrained(trained[1]).get_vocab()
    assert {"glimmer", "pumpkin", "walrus", "zeppelin"} <= words.keys() and "quasar" not in words


@pytest.mark.parametrize(
    "wrong", ["--vocab_size=10", f"--vocab_size={10**11}", "--max_megabytes=0"]
)
def test_the_script_s_numbers_have_bounds(
    tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train_tokenizer.main(["--data_path", "a", "--output", str(tmp_path / "out"), wrong])
    name, _, value = wrong.partition("=")
    assert ended.value.code == 2 and f"{name} is {value}, expected " in capsys.readouterr().err


def test_a_trained_tokenizer_keeps_minimind_ids_and_every_text(
    trained: tuple[list[Path], Path],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[1])
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.decode(tokenizer("naïve 🙂\r\n\0")["input_ids"]) == "naïve 🙂\r\n\0"


def test_the_same_texts_give_the_same_bytes(
    trained: tuple[list[Path], Path], tmp_path: Path
) -> None:
    sources, output = trained
    save(train(sample_texts(find_texts(map(str, sources)), 10**6, 42), 400), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_the_vocabulary_has_the_requested_size(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghij ", k=200)) for _ in range(100)]
    tokenizer = train(iter(texts), 400)
    save(tokenizer, tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 400


def test_a_sample_is_bounded_and_even(tmp_path: Path) -> None:
    texts = [f"{i:05d} " + "x" * 94 for i in range(20_000)]
    first = write_jsonl(tmp_path / "a.jsonl", texts[:12_000])
    files = [first, write_jsonl(tmp_path / "b.jsonl", texts[12_000:])]
    sample = list(sample_texts(files, 400_000, 42))
    assert 340_000 < sum(map(len, sample)) < 440_000
    of_each_tenth = Counter(int(text[:5]) // 2_000 for text in sample)
    assert all(of_each_tenth[i] == pytest.approx(360, abs=90) for i in range(10))
    assert len(set(sample)) == len(sample)
    assert list(sample_texts(files, 400_000, 42)) == sample != list(sample_texts(files, 400_000, 1))


def test_a_small_corpus_is_used_whole(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(100)]
    assert list(sample_texts([write_jsonl(tmp_path / "a.jsonl", texts)], 10**6, 42)) == texts


def test_a_bad_record_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"story": "bad"}\n')
    words = ("--data_path", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    with start_python(*SCRIPT, *words) as process:
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 3
    assert complaint.startswith("error: ") and "a.jsonl line 2" in complaint
    assert len(complaint.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one\.txt.*two\.jsonl"):
        find_texts([str(tmp_path / "one.txt"), str(tmp_path / "two.jsonl")])
