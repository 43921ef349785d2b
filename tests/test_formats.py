"""Each format of data gives the same token cache as its JSONL twin; and the data report."""

import gzip
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset import records, token_cache
from dataset.records import DataError, expected_line, find_files, read_documents, text_content
from dataset.token_cache import TokenCache, build_token_cache
from scripts import prepare_data
from tests.helpers import ROOT, shipped_tokenizer, write_jsonl

TEXTS = [
    "The capital of France is Paris.",
    "中国的首都是北京。\n水结成冰的温度是零度。",
    "a\tb  c",
    "    indented\n    twice",
    "emoji 🙂 and naïve café",
    "<|im_end|> inside",
    "x" * 3000,
]


def packed_zst(path: Path, data: bytes) -> None:
    zstd = pytest.importorskip("backports.zstd")
    path.write_bytes(zstd.compress(data[:50]) + zstd.compress(data[50:]))  # two frames


def parquet(path: Path, texts: list, column: str = "text", large: bool = False) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    kind = pyarrow.large_string() if large else pyarrow.string()
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, kind)})
    pq.write_table(table, path, row_group_size=3)
    return path


def write_as(kind: str, folder: Path) -> Path:
    """The texts in one of the formats."""
    folder.mkdir()
    twin = write_jsonl(folder / "twin", TEXTS).read_bytes()
    (folder / "twin").unlink()
    path = folder / f"corpus.{kind}"
    blank_line = "\r\n \r\n" if kind == "txt" else "\n\n\n"
    paragraphs = ("\ufeff\n\n" + blank_line.join(TEXTS)).encode()
    write: dict[str, Callable] = {
        "jsonl.gz": lambda: path.write_bytes(gzip.compress(twin[:99]) + gzip.compress(twin[99:])),
        "jsonl.zst": lambda: packed_zst(path, twin),
        "txt": lambda: path.write_bytes(paragraphs),
        "txt.gz": lambda: path.write_bytes(gzip.compress(paragraphs)),
        "txt.zst": lambda: packed_zst(path, paragraphs),
        "parquet": lambda: parquet(path, TEXTS),
    }
    write[kind]()
    return path


KINDS = ("jsonl.gz", "jsonl.zst", "txt", "txt.gz", "txt.zst", "parquet")


def test_each_entry_of_the_tables_is_tested_here() -> None:
    assert {*KINDS, "jsonl"} == {ending.removeprefix(".") for ending in records.ENDINGS}


def files_of(cache: TokenCache) -> dict[str, str]:
    """Digests of the files of a cache that training reads."""
    return {name: cache.meta["sha256"][name] for name in token_cache.FILES}


def built(path: Path | str | list, tmp_path: Path, **more: object) -> TokenCache:
    return build_token_cache(path, shipped_tokenizer(), tmp_path / "cache", **more)


@pytest.fixture
def twin(tmp_path: Path) -> TokenCache:
    return built(write_jsonl(tmp_path / "twin.jsonl", TEXTS), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_gives_the_cache_of_its_jsonl_twin(
    tmp_path: Path, twin: TokenCache, kind: str
) -> None:
    cache = built(write_as(kind, tmp_path / "data"), tmp_path)
    assert cache.folder != twin.folder, "made from this file, not found"
    assert files_of(cache) == files_of(twin)
    assert cache.meta["num_documents"] == len(TEXTS)


@pytest.mark.parametrize("how", ["folder", "pattern", "names"])
def test_a_folder_a_pattern_and_a_list_mean_their_files_in_order(
    tmp_path: Path, twin: TokenCache, how: str
) -> None:
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS[:3])
    (folder / "b" / "c.txt").write_text("\n\n".join(TEXTS[3:5]), encoding="utf-8")
    (folder / "b" / "d.jsonl.gz").write_bytes(
        gzip.compress(write_jsonl(tmp_path / "d", TEXTS[5:]).read_bytes())
    )
    (folder / "notes.md").write_text("not data")
    names = [folder / "a.jsonl", folder / "b/c.txt", folder / "b/d.jsonl.gz"]
    given = {
        "folder": str(folder),
        "pattern": str(folder / "**" / "*.[jt]*"),
        "names": [str(name) for name in names],
    }[how]
    assert find_files(given) == names
    assert files_of(built(given, tmp_path)) == files_of(twin)


def test_another_column_is_read_and_makes_another_cache(tmp_path: Path, twin: TokenCache) -> None:
    lines = [json.dumps({"text": "other", "content": text}) for text in TEXTS]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    first, second = built(path, tmp_path), built(path, tmp_path, text_column="content")
    assert first.folder != second.folder
    assert files_of(second) == files_of(twin) != files_of(first)
    columns = parquet(tmp_path / "a.parquet", TEXTS, "content", large=True)
    assert files_of(built(columns, tmp_path, text_column="content")) == files_of(twin)


def test_the_same_bytes_under_another_ending_are_other_documents(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    as_text = tmp_path / "a.txt"
    as_text.write_bytes(lines.read_bytes())
    assert built(lines, tmp_path).meta["num_documents"] == 2
    assert built(as_text, tmp_path).meta["num_documents"] == 1


def test_a_run_reads_parquet_and_another_column(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS * 3, "content")
    words = [
        sys.executable,
        "train_pretrain.py",
        "--preset",
        "demo",
        "--data_path",
        path,
        "--text_column",
        "content",
        "--hidden_size",
        16,
        "--num_hidden_layers",
        1,
        "--max_seq_len",
        16,
        "--epochs",
        1,
        "--heldout_fraction",
        0.1,
        "--save_dir",
        tmp_path,
        "--checkpoint_dir",
        tmp_path,
        "--cache_dir",
        tmp_path / "cache",
        "--device",
        "cpu",
    ]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pretrain_16.pth").exists() and "21 documents" in done.stdout


# ------------------------------------------------------------------------------ what goes wrong


def message(path: Path, **more: object) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(path, content=text_content(**more)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "txt.gz"])
def test_a_file_cut_short_is_never_taken_for_whole(tmp_path: Path, kind: str) -> None:
    path = write_as(kind, tmp_path / "data")
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 3):
        path.write_bytes(data[:size])
        assert str(path) in message(path)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_with_another_content_than_its_name_says(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl.zst":
        pytest.importorskip("backports.zstd")
    write_jsonl(path, TEXTS)
    assert "cannot be " in message(path)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("a.md", "Rename it to .txt"),
        ("a.csv", 'Dataset.from_csv("corpus.csv").to_parquet("corpus.parquet")'),
        ("a.csv.gz", "Dataset.from_csv"),
        ("a.tsv", 'sep="\\t"'),
        ("saved/data-00000-of-00001.arrow", 'load_from_disk("folder").to_parquet'),
        ("a.jsonl.xz", "Unpack it; of compressed files, gzip and zstd are."),
        ("a.tar.gz", "Unpack it"),
    ],
)
def test_a_format_that_is_not_read_is_refused_with_the_way_to_one_that_is(
    tmp_path: Path, name: str, way_out: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("text,url\n")
    folder = path.parent
    for given in (path, folder, f"{folder}/*{path.suffix}"):
        with pytest.raises(DataError) as caught:
            built(given, tmp_path)
        said = str(caught.value)
        assert said.startswith(f"--data_path {path}: files in .") and way_out in said
        assert ", ".join(records.ENDINGS) in said and "bad_records" not in said


def test_a_folder_with_files_that_are_read_may_hold_others(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a,b\n")
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert find_files(tmp_path) == [path]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_array_is_refused_without_advice_to_skip_it(
    tmp_path: Path, name: str, indent: int | None
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=indent))
    with pytest.raises(DataError) as caught:
        built(path, tmp_path)
    assert str(caught.value).startswith(
        f"{path} is a JSON array. Expected one JSON object per line"
    )
    assert "bad_records" not in str(caught.value)
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert built(path, tmp_path).meta["num_documents"] == len(TEXTS)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("HuggingFaceFW/fineweb", "hf download HuggingFaceFW/fineweb --repo-type dataset"),
        ("hf://datasets/owner/name/a.parquet", "Copy them here first: hf download, aws s3 cp"),
        ("s3://bucket/a.jsonl", "Copy them here first"),
    ],
)
def test_data_elsewhere_is_to_be_copied_first(name: str, way_out: str) -> None:
    with pytest.raises(DataError, match=f"^--data_path {name}: no such file.*{way_out}"):
        find_files(name)
    with pytest.raises(DataError) as caught:
        find_files("dataset/nowhere")
    assert "hf download" not in str(caught.value)


def test_bad_rows_and_paragraphs_are_named_by_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\n\nbad \xff\nmore\n\nlast")
    assert message(path) == (
        f"{path} line 4 (byte 7): byte 0xff is not UTF-8. Convert the file to UTF-8."
    )
    found: list[str] = []
    assert [text for text, _ in read_documents(path, found.append)] == ["good", "last"]
    assert len(found) == 1
    rows = parquet(tmp_path / "a.parquet", ["one", None, "three"])
    assert "row 2: no text" in message(rows)
    assert [text for text, _ in read_documents(rows, found.append)] == ["one", "three"]
    lines = write_jsonl(tmp_path / "a.jsonl", ["one"])
    found_in_line = message(lines, text_column="content")
    assert f"no \"content\"; its keys: 'text'. {expected_line('content')}" in found_in_line
    assert 'with a string "content": {"content": "..."}.' in found_in_line
    assert 'has no column "content"; its columns: id, text.' in message(rows, text_column="content")
    assert 'its column "id" is of int64' in message(rows, text_column="id")


def test_a_text_without_blank_lines_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text("short\n\n" + "a line of the long one\n" * 50 + "\nlast\n")
    found: list[str] = []
    assert [text for text, _ in read_documents(path, found.append)] == ["short", "last"]
    assert found == [
        f"{path} line 3 (byte 7): more than 100 bytes without a blank line. "
        f"Expected one between two documents."
    ]


def test_a_long_line_of_text_is_not_cut_after_a_byte_order_mark_or_blanks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    for start in ("\ufeff" + "x" * 90, " " * 101):
        path = tmp_path / "a.txt"
        path.write_text(f"{start} end of the long line\n\nlast\n")
        found: list[str] = []
        assert [text for text, _ in read_documents(path, found.append)] == ["last"]
        assert found[0].startswith(f"{path} line 1 (byte 0): more than 100 bytes without")


def test_a_document_of_parquet_is_as_long_as_a_line_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    path = parquet(tmp_path / "a.parquet", ["one", "é" * 50, "x" * 101, "é" * 51, "last"])
    found: list[str] = []
    texts = [text for text, _ in read_documents(path, found.append)]
    assert texts == ["one", "é" * 50, "last"]
    way_out = "expected up to 100. Split it into several rows."
    assert found == [
        f"{path} row 3: a document of 101 bytes, {way_out}",
        f"{path} row 4: a document of 102 bytes, {way_out}",
    ]
    with pytest.raises(DataError, match=r"row 3: .*rows\. Correct it, or .*--bad_records skip"):
        build_token_cache(path, shipped_tokenizer(), tmp_path / "cache")
    cache = build_token_cache(path, shipped_tokenizer(), tmp_path / "cache", bad_records="skip")
    assert (cache.meta["num_documents"], cache.meta["num_bad"]) == (3, 2)


@pytest.mark.parametrize(
    ("kind", "package", "name"),
    [("jsonl.zst", "backports.zstd", "backports.zstd"), ("parquet", "pyarrow", "pyarrow")],
)
def test_a_missing_package_is_one_line(tmp_path: Path, kind: str, package: str, name: str) -> None:
    path = write_as(kind, tmp_path / "data")
    code = (
        f"import sys; sys.modules[{package!r}] = None; from scripts.prepare_data import main; "
        f"sys.exit(main(['--data_path', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.endswith(f"pip install {name}\n") and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------- report


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    texts = ["English words only. " * 10, "只有中文。" * 40, "def f(x):\n    return x;\n", "same"]
    texts += ["same", "same", "long " * 3000]
    cache = built(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path)
    lengths = cache.offsets.diff()
    said = prepare_data.report(cache, shipped_tokenizer())
    rows = {line.split()[0]: line for line in said.splitlines() if not line.startswith(" ")}
    num_bytes = sum(len(text.encode()) for text in texts)
    assert rows["documents"].startswith("documents   7; skipped: 0 without text, 0 bad records")
    rate = num_bytes / int(lengths.sum())
    assert f" from {num_bytes:,} bytes, {rate:.2f} bytes per token" in rows["tokens"]
    assert "2 documents are exact copies" in rows["duplicates"]
    padding = sum(max(0, 340 - n - 2) for n in lengths.tolist()) / (7 * 340)
    cut = sum(max(0, n + 2 - 340) for n in lengths.tolist()) / (int(lengths.sum()) + 14)
    assert f"would be {padding:.0%} padding and lose {cut:.0%} of" in rows["padded"]
    counts = re.findall(r"^ +(?:to [\d,]+|more) +(\d+) +[\d.]+%", said, flags=re.MULTILINE)
    edges = [0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10**9]
    assert [int(count) for count in counts] == [
        sum(low < n <= high for n in lengths.tolist()) for low, high in itertools.pairwise(edges)
    ]


def test_kinds_of_text_are_distinguished() -> None:
    assert prepare_data.kinds_of_text("只有中文。") == {"Chinese": 15, "English": 0}
    assert prepare_data.kinds_of_text("Plain words, and a number: 5.")["code"] == 0
    for code in (
        "    return x;",
        "$ sudo apt install vim",
        "if (a == b) {",
        "x = f(1)",
        "import os",
        "ls -la /usr/share/doc",
    ):
        assert prepare_data.kinds_of_text(code)["English"] == 0, code
    both = prepare_data.kinds_of_text("中文 with English words")
    assert both == {"Chinese": 6, "English": 19}


def test_copies_are_compared_token_by_token(tmp_path: Path) -> None:
    cache = built(write_jsonl(tmp_path / "a.jsonl", ["one two", "two one", "one two"]), tmp_path)
    assert prepare_data.duplicates(cache)[0] == 1
    cache.hashes[:] = 7  # as if all collided
    assert prepare_data.duplicates(cache)[0] == 1


def test_the_report_is_a_flag_of_the_tokenizing_command(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    words = ["--data_path", path, "--cache_dir", tmp_path / "cache", "--report"]
    assert prepare_data.main([str(word) for word in words]) == 0
    assert "duplicates  0 documents" in capsys.readouterr().out
