"""Bad data is never trained on silently: it is reported with file, line and byte, or counted."""

import codecs
import gzip
import json
import os
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset import records, token_cache
from dataset.records import DataError
from dataset.token_cache import FILES, TokenCache, build_token_cache
from tests.helpers import shipped_tokenizer, write_jsonl

HINT = " Correct it, or skip such records with --bad_records skip."
GOOD = [  # the first is long, so that offsets have thousands
    json.dumps({"text": "A long one. " * 100}).encode(),
    '{"id": 7, "text": "深度学习 🙂"}'.encode(),
    rb'{"text": "half \ud83d\ude42 and half, \u0000 and <|im_end|>"}',
]
LIMIT = 2**17  # bytes in a line, for the tests of BAD: small, but above the deep nesting
BAD = {
    "cut short": (b'{"text": "once', "not valid JSON: Unterminated string starting at column 10"),
    "cut before the value": (b'{"text":', "not valid JSON: Expecting value at column 9"),
    "trailing comma": (b'{"text": "once",}', "not valid JSON: "),
    "single quotes": (b"{'text': 'once'}", "not valid JSON: "),
    "no JSON": (b"once upon a time", "not valid JSON: Expecting value at column 1"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "extra data after the first value at column 1"),
    "old line ends": (b'{"text": "a"}\r{"text": "b"}', "extra data after the first value"),
    "invalid UTF-8": (b'{"text": "\xff"}', "byte 0xff at column 11 is not UTF-8"),
    "overlong UTF-8": (b'{"text": "\xc0\xaf"}', "byte 0xc0 at column 11 is not UTF-8"),
    "surrogate as UTF-8": (b'{"text": "\xed\xa0\x80"}', "byte 0xed at column 11 is not UTF-8"),
    "half a surrogate pair": (rb'{"text": "\ud83d"}', "an unpaired surrogate"),
    "two byte order marks": (codecs.BOM_UTF8 * 2 + b'{"text": "a"}', "a byte order mark"),
    "key twice": (b'{"text": "a", "text": "b"}', "cannot be read: duplicate key 'text'"),
    "inner key twice": (b'{"text": "a", "b": [{"c": 1, "c": 1}]}', "cannot be read: duplicate key"),
    "NaN": (b'{"text": "a", "score": NaN}', "cannot be read: NaN is not JSON"),
    "Infinity": (b'{"text": "a", "score": Infinity}', "cannot be read: Infinity is not JSON"),
    "-Infinity": (b'{"text": -Infinity}', "cannot be read: -Infinity is not JSON"),
    "null": (b'{"text": null}', '"text" is a JSON null'),
    "number": (b'{"text": 1}', '"text" is a JSON number'),
    "list": (b'{"text": ["a"]}', '"text" is a JSON array'),
    "false": (b'{"text": false}', '"text" is a JSON boolean'),
    "wrong key": (b'{"txet": "a", "id": 1}', "no \"text\"; its keys: 'txet', 'id'"),
    "no key": (b"{}", 'no "text"; its keys: none'),
    "array": (b'["once"]', "found a JSON array"),
    "string": (b'"once"', "found a JSON string"),
    "integer": (b"1", "found a JSON number"),
    "5,000 digits": (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "cannot be read: Exceeds"),
    "deep": (b'{"text": "a", "b": ' + b"[" * 100_000, "cannot be read: "),
    "deep text": (b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}", ""),  # Python may read this much
    "too long": (b'{"text": "' + b"a" * LIMIT + b'"}', "a line longer than 131,072 bytes"),
    "NUL": (b'{"text": "\x00"}', "not valid JSON: Invalid control character"),
    "tab": (b'{"text": "a\tb"}', "not valid JSON: Invalid control character"),
    "form feed": (b"\x0c", "not valid JSON: Expecting value at column 1"),
}
PLACES = {"first": (0, b"\n"), "middle": (1, b"\n"), "last": (3, b"\n"), "at the end": (3, b"")}
each_mode = pytest.mark.parametrize("mode", ["stop", "skip"])


def build(folder: Path, *paths: Path, mode: str = "stop") -> TokenCache:
    """The cache of these files, in ``folder``."""
    data_path = [*map(str, paths)]
    return build_token_cache(data_path, shipped_tokenizer(), folder / "cache", bad_records=mode)


def contents(cache: TokenCache) -> dict[str, bytes]:
    """What was tokenized."""
    return {name: (cache.folder / name).read_bytes() for name in FILES}


def refusal(folder: Path, *paths: Path, mode: str = "stop") -> str:
    """The one line with which a build ends; it must leave nothing behind."""
    with pytest.raises(DataError) as caught:
        build(folder, *paths, mode=mode)
    assert list((folder / "cache").iterdir()) == []
    message = str(caught.value)
    assert caught.value.exit_status == 3 and len(message.splitlines()) == 1
    assert len(message) < 350 + len(str(folder))
    return message


def file_with(folder: Path, bad: bytes, place: int, end: bytes) -> tuple[Path, str]:
    """The good lines with a bad one among them, and where the messages say that it is."""
    lines = [*GOOD[:place], bad, *GOOD[place:]]
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    offset = sum(len(line) + 1 for line in lines[:place])
    return path, f"{path} line {place + 1} (byte {offset:,}): "


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache of the good lines alone."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "good.jsonl").write_bytes(b"\n".join(GOOD))
    return contents(build(folder, folder / "good.jsonl"))


# ---------------------------------------------------------------------------- bad among good lines


@pytest.mark.parametrize(("bad", "found"), BAD.values(), ids=BAD)
@pytest.mark.parametrize(("place", "end"), PLACES.values(), ids=PLACES)
def test_a_bad_record_is_named_and_stops_the_build_or_alone_is_skipped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    good: dict[str, bytes],
    bad: bytes,
    found: str,
    place: int,
    end: bytes,
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", LIMIT)
    path, where = file_with(tmp_path, bad, place, end)
    message = refusal(tmp_path, path)
    assert message.startswith(where + found), message
    assert message.endswith(f". {records.expected_line()}{HINT}")
    cache = build(tmp_path, path, mode="skip")
    assert contents(cache) == good
    assert cache.meta["num_documents"] == 3 and cache.meta["num_bad"] == 1
    assert cache.meta["bad_examples"] == [message.removesuffix(HINT)]


def test_a_missing_newline_is_suspected_after_two_objects(tmp_path: Path) -> None:
    path, _ = file_with(tmp_path, *BAD["two objects"][:1], 1, b"\n")
    assert "missing newline" in refusal(tmp_path, path)


def test_all_bad_records_are_counted_and_the_first_three_reported(
    tmp_path: Path, good: dict[str, bytes]
) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    one.write_bytes(b"\n".join([b"bad", GOOD[0], b"", b"bad"]))
    two.write_bytes(b"\n".join([GOOD[1], b"bad", GOOD[2], b"bad", b"bad\r\n"]))
    cache = build(tmp_path, one, two, mode="skip")
    assert contents(cache) == good
    assert cache.meta["num_bad"] == 5
    offset = len(GOOD[0]) + 6
    places = [
        "1.jsonl line 1 (byte 0): ",
        f"1.jsonl line 4 (byte {offset:,}): ",
        "2.jsonl line 2 (byte ",
    ]
    examples = cache.meta["bad_examples"]
    assert len(examples) == 3
    assert all(
        e.startswith(f"{tmp_path}/{place}") for e, place in zip(examples, places, strict=True)
    ), examples


def test_a_file_of_bad_records_only_is_refused_even_if_they_may_be_skipped(tmp_path: Path) -> None:
    good, bad = write_jsonl(tmp_path / "good.jsonl", ["fine"]), tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"story": "once"}\n\n{"story": "twice"}\n')
    message = refusal(tmp_path, good, bad, mode="skip")
    start = f"no good record among the 2 in {bad}. The first: {bad} line 1 (byte 0): "
    assert message.startswith(start)


def test_a_line_of_the_greatest_length_is_read_and_one_byte_more_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: dict[str, bytes]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" for line in GOOD))
    longest = len(GOOD[0]) + 1
    monkeypatch.setattr(records, "MAX_LINE_BYTES", longest)
    assert contents(build(tmp_path / "1", tmp_path / "a.jsonl")) == good
    monkeypatch.setattr(records, "MAX_LINE_BYTES", longest - 1)
    assert "a.jsonl line 1 (byte 0): a line longer" in refusal(tmp_path, tmp_path / "a.jsonl")


def test_a_blank_start_does_not_hide_the_rest_of_a_line_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 2000)
    path, where = file_with(tmp_path, b" " * 2001 + b"once", 1, b"\n")
    assert refusal(tmp_path, path).startswith(where)


def test_a_line_of_64_mib_is_skipped_without_being_held_in_memory(
    tmp_path: Path, good: dict[str, bytes]
) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD[0] + b"\n")
        file.writelines(b"x" * 2**20 for _ in range(64))
        file.write(b"\n" + b"\n".join([*GOOD[1:], b"bad"]))
        offset = file.tell() - 3
    tracemalloc.start()
    cache = build(tmp_path, path, mode="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents(cache) == good and cache.meta["num_bad"] == 2
    assert cache.meta["bad_examples"][1].startswith(f"{path} line 5 (byte {offset:,}): not valid")
    assert peak < 3 * records.MAX_LINE_BYTES == 48 * 2**20


# --------------------------------------------------------------------- what is not a bad record


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n".join(GOOD) + b"\r\n",
        b"\n\r\n \t\n".join([b"", *GOOD, b""]),
        b"\n".join(GOOD),
        codecs.BOM_UTF8 + b"\n".join(GOOD),
        codecs.BOM_UTF8 + b"\r\n" + b"\n".join(GOOD),
        b"\n".join(b" " + line + b"\t" for line in GOOD),
    ],
    ids=["CRLF", "blank lines", "no final newline", "BOM", "BOM alone", "blanks around"],
)
def test_what_other_programs_write_is_the_same_corpus(
    tmp_path: Path, good: dict[str, bytes], data: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    cache = build(tmp_path, tmp_path / "a.jsonl")
    assert contents(cache) == good
    assert cache.meta["num_bad"] == 0 and cache.meta["bad_examples"] == []


def test_a_line_ends_at_a_newline_and_at_no_other_separator(tmp_path: Path) -> None:
    texts = ["one\u2028line", "an\u0085other", "and\u2029one"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert [text for text, _ in records.read_documents(path)] == texts


def test_a_byte_order_mark_is_refused_where_files_were_joined(tmp_path: Path) -> None:
    path, where = file_with(tmp_path, codecs.BOM_UTF8 + b'{"text": "a"}', 1, b"\n")
    assert refusal(tmp_path, path).startswith(f"{where}a byte order mark")


def test_empty_documents_are_dropped_and_counted_apart(
    tmp_path: Path, good: dict[str, bytes]
) -> None:
    lines = [b'{"text": ""}', *GOOD, b'{"text": " \\n\\u3000"}', b"bad"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    cache = build(tmp_path, tmp_path / "a.jsonl", mode="skip")
    assert contents(cache) == good
    assert cache.meta["num_empty"] == 2 and cache.meta["num_bad"] == 1


# ------------------------------------------------------------------------------- unusable files


@each_mode
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (gzip.compress(GOOD[0]), "gzip; end its name in .gz"),
        (b"\x28\xb5\x2f\xfd\x04\x00" + GOOD[0], "zstd; end its name in .zst"),
        (b"PAR1\x15\x04" + GOOD[0], "parquet; end its name in .parquet"),
        (codecs.BOM_UTF16_LE + GOOD[0].decode().encode("utf-16-le"), "UTF-16; convert it to UTF-8"),
        (codecs.BOM_UTF16_BE + GOOD[0].decode().encode("utf-16-be"), "UTF-16; convert it to UTF-8"),
        (codecs.BOM_UTF32_LE + GOOD[0].decode().encode("utf-32-le"), "UTF-32; convert it to UTF-8"),
        (codecs.BOM_UTF32_BE + GOOD[0].decode().encode("utf-32-be"), "UTF-32; convert it to UTF-8"),
    ],
    ids=["gzip", "zstd", "parquet", "UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"],
)
@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_a_file_in_another_format_is_named_and_never_skipped(
    tmp_path: Path, data: bytes, what: str, mode: str, ending: str
) -> None:
    good, other = write_jsonl(tmp_path / "good.jsonl", ["fine"]), tmp_path / f"other.{ending}"
    other.write_bytes(data + b"\n" + GOOD[1] + b"\n")
    assert refusal(tmp_path, good, other, mode=mode) == f"{other} is {what}."


@each_mode
@pytest.mark.parametrize("layout", ["one line", "line by line", "indented", "longer than a line"])
def test_a_json_array_is_named_and_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, mode: str
) -> None:
    documents = [{"text": f"document {i}"} for i in range(20)]
    indent = 1 if layout == "indented" else None
    data = json.dumps(documents, indent=indent, separators=(",\n", ":") if "by" in layout else None)
    if layout == "longer than a line":
        monkeypatch.setattr(records, "MAX_LINE_BYTES", len(data) // 2)
    (tmp_path / "a.jsonl").write_text("\n" + data)
    message = refusal(tmp_path, tmp_path / "a.jsonl", mode=mode)
    assert "JSON array" in message and "Expected one JSON object per line" in message


@each_mode
@pytest.mark.parametrize("data", [b"", b"\n \r\n\t", codecs.BOM_UTF8], ids=["", "blank", "BOM"])
def test_a_file_without_records_is_refused_even_among_good_ones(
    tmp_path: Path, data: bytes, mode: str
) -> None:
    one, two = (write_jsonl(tmp_path / f"{i}.jsonl", ["fine"]) for i in (1, 3))
    empty = tmp_path / "2.jsonl"
    empty.write_bytes(data)
    assert refusal(tmp_path, one, empty, two, mode=mode).startswith(f"no records in {empty}. ")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "late"}\n')


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"fine", b"fire"))  # as long as before


@pytest.mark.parametrize("change", [append, edit])
def test_a_corpus_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    one, two = (write_jsonl(tmp_path / f"{i}.jsonl", ["fine"]) for i in (1, 2))
    os.utime(two, (0, 0))  # so that a file system with a coarse clock shows the change
    original = token_cache.write_cache

    def write_cache(*arguments: object) -> dict:
        change(two)
        return original(*arguments)

    with monkeypatch.context() as during:
        during.setattr(token_cache, "write_cache", write_cache)
        assert refusal(tmp_path, one, two).startswith(f"{two} changed while it was being read")
    assert build(tmp_path, one, two).meta["num_documents"] == 2 + (change is append)


# ------------------------------------------------------------------------------ caches found later


def test_what_one_run_skipped_stops_the_next_that_must_not_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: dict[str, bytes]
) -> None:
    path, _ = file_with(tmp_path, b"bad", 1, b"\n")
    message = refusal(tmp_path, path)
    cache = build(tmp_path, path, mode="skip")
    with pytest.raises(DataError) as caught:
        build(tmp_path, path)
    assert str(caught.value) == message
    monkeypatch.delattr(token_cache, "write_cache")  # the third finds it made
    assert build(tmp_path, path, mode="skip").folder == cache.folder and contents(cache) == good


@each_mode
def test_both_modes_share_the_cache_of_a_corpus_without_bad_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["fine"])
    folder = build(tmp_path, path, mode=mode).folder
    monkeypatch.delattr(token_cache, "write_cache")
    assert build(tmp_path, path, mode="stop" if mode == "skip" else "skip").folder == folder


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def edit_meta(path: Path, **changes: object) -> None:
    """Change fields of meta.json; None takes one away."""
    meta = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}, indent=1))


DAMAGE = {
    **{f"bit of {name}": (name, flip_a_bit) for name in FILES},
    "end lost": ("tokens.bin", lambda path: os.truncate(path, 10)),
    "file lost": ("hashes.bin", Path.unlink),
    "meta lost": ("meta.json", Path.unlink),
    "meta cut": ("meta.json", lambda path: os.truncate(path, 40)),
    "meta empty": ("meta.json", lambda path: os.truncate(path, 0)),
    "meta not text": ("meta.json", lambda path: path.write_bytes(b"\xff")),
    "meta an array": ("meta.json", lambda path: path.write_text("[]")),
    "no digests": ("meta.json", lambda path: edit_meta(path, sha256=None)),
    "digests a string": ("meta.json", lambda path: edit_meta(path, sha256="none")),
    "field lost": ("meta.json", lambda path: edit_meta(path, num_tokens=None)),
    "count changed": ("meta.json", lambda path: edit_meta(path, num_bad=0)),
    "format changed": ("meta.json", lambda path: edit_meta(path, format=1)),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_again_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    path, _ = file_with(tmp_path, b"bad", 1, b"\n")
    folder = build(tmp_path, path, mode="skip").folder
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder / name)
    build(tmp_path, path, mode="skip")
    warning = f"warning: token cache {folder} is damaged ({name}); rebuilding it\n"
    assert capsys.readouterr().err == warning
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]
    build(tmp_path, path, mode="skip")
    assert capsys.readouterr().err == ""


def test_two_processes_may_find_the_same_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["fine"])
    folder = build(tmp_path, path).folder
    elsewhere = folder.rename(tmp_path / "taken")
    assert token_cache.damaged_file(folder) == "meta.json"  # rather than an exception
    elsewhere.rename(folder)
    original = token_cache.damaged_file

    def taken_by_another(folder: Path) -> str | None:
        folder.rename(elsewhere)
        return original(folder)

    monkeypatch.setattr(token_cache, "damaged_file", taken_by_another)
    assert build(tmp_path, path).folder == folder
    assert list(folder.parent.iterdir()) == [folder]


def test_what_a_killed_removal_left_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / "cache" / f".damaged-{socket.gethostname()}-999999999"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"x")
    path = write_jsonl(tmp_path / "a.jsonl", ["fine"])
    assert list((tmp_path / "cache").iterdir()) == [left]
    folder = build(tmp_path, path).folder
    assert list((tmp_path / "cache").iterdir()) == [folder]


class Stopped(BaseException):
    """What a signal's handler may raise."""


def encoding_threads() -> list[str]:
    """Those alive; tqdm has its own thread."""
    return [t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_a_signal_ends_a_build_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a document " * 20] * 100)
    calls = []

    def encode(tokenizer: object, texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        time.sleep(0.1)  # the next batch is waiting, and so is the main thread, for this one
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
        return [[1]] * len(texts)

    def handler(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(token_cache, "BATCH_BYTES", 1000)
    monkeypatch.setattr(token_cache, "encode", encode)
    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Stopped):
            build(tmp_path, path)
        assert encoding_threads() == []
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(calls) == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_error_while_writing_ends_the_thread_that_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a document " * 20] * 100)
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 1000)
    monkeypatch.setattr(token_cache, "encode", lambda _, texts: [[-1]] * len(texts))  # no id
    with pytest.raises(OverflowError) as caught:
        build(tmp_path, path)
    assert caught.tb is not None  # whoever reports an error keeps all that its frames hold
    assert encoding_threads() == []
    assert list((tmp_path / "cache").iterdir()) == []
