"""JSONL, read strictly: each line is a document, or a bad record named by file, line and byte.

What Python's json lets pass and a corpus should not have (a key twice, NaN, half of a surrogate
pair) is a bad record here. Memory holds one line, and of one too long for a document its start.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

MAX_LINE_BYTES = 16 * 2**20  # end of line included; a longer one has most likely lost its newlines
WAY_TO_DATA = (
    "Download MiniMind's corpus from https://huggingface.co/datasets/jingyaogong/minimind_dataset "
    "into dataset/, or try --preset demo."
)
EXPECTED = 'Expected one JSON object a line, in UTF-8, with a string "text": {"text": "..."}.'
BLANKS = b" \t\r\n"  # JSON's own; bytes.strip() alone would drop control characters as well
TYPE_NAMES = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
NOT_TEXT = {  # what a file begins with -> what it is and what to do about it
    b"\x1f\x8b": "gzip; decompress it first",
    b"\x28\xb5\x2f\xfd": "zstd; decompress it first",
    codecs.BOM_UTF32_LE: "UTF-32; convert it to UTF-8",  # before UTF-16: it begins as that does
    codecs.BOM_UTF32_BE: "UTF-32; convert it to UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16; convert it to UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; convert it to UTF-8",
}


class DataError(ValueError):
    """The data cannot be trained on as it is; the message names file and line."""

    exit_status = 3


def stop(message: str) -> NoReturn:
    """What ``read_documents`` does about a bad record unless told otherwise."""
    raise DataError(message)


def find_files(data_path: str | list[str]) -> list[Path]:
    """The JSONL files that ``--data_path`` means: files as given, a folder's ``*.jsonl`` by name.

    Raises: DataError if one is missing or a folder holds none."""
    files: list[Path] = []
    for given in [data_path] if isinstance(data_path, str | Path) else data_path:
        path = Path(given)
        found = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"--data_path {given}: the folder holds no *.jsonl file.")
        if not found[0].is_file():
            raise DataError(f"--data_path {given}: no such file. {WAY_TO_DATA}")
        files += found
    return files


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object's content. Raises: ValueError if a key comes twice: which one is meant?"""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.40} comes twice")
    return record


def refuse_constant(name: str) -> NoReturn:
    """Python reads NaN and Infinity as floats; JSON has no such numbers."""
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=without_repeats, parse_constant=refuse_constant)


def parse(line: bytes) -> object:
    """What the JSON of one line says. Raises: ValueError with what is wrong with it."""
    if line.startswith(codecs.BOM_UTF8):
        raise ValueError("a byte order mark, which only the start of a file may have")
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{found} is not UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            found = f"more behind the first value at column {error.colno}"
            raise ValueError(f"{found} (missing newline?)") from None
        found = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise ValueError(f"not valid JSON: {found}") from None
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond Python's
        raise ValueError(f"cannot be read: {error}") from None


def find_text(line: bytes) -> str:
    """The document in one line. Raises: ValueError with what was found in its place."""
    record = parse(line)
    if not isinstance(record, dict):
        raise ValueError(f"found a JSON {TYPE_NAMES.get(type(record), 'number')}")
    if "text" not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f'no "text"; its keys: {keys:.80}')
    if not isinstance(text := record["text"], str):
        raise ValueError(f'"text" is a JSON {TYPE_NAMES.get(type(text), "number")}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError('half of a surrogate pair (\\ud800-\\udfff) in "text"') from None
    return text


def check_start(path: Path, line: bytes) -> None:
    """Raises: DataError if a file's first record shows that the whole file is in another form.

    To skip bad records is no way out then: the lines that happen to parse are no corpus."""
    for start, what in NOT_TEXT.items():
        if line.startswith(start):
            raise DataError(f"{path} is {what}.")
    if line.lstrip(BLANKS).startswith(b"[") and not line.endswith(b"]"):
        raise DataError(f"{path} is one JSON array. {EXPECTED}")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line; no more than MAX_LINE_BYTES + 1 bytes of it."""
    offset = 0
    with path.open("rb") as file:
        while piece := file.readline(MAX_LINE_BYTES + 1):
            yield offset, piece
            offset += len(piece)
            while not piece.endswith(b"\n") and (piece := file.readline(2**20)):
                offset += len(piece)


def read_documents(
    path: Path, refuse: Callable[[str], None] = stop
) -> Iterator[tuple[str, int]]:
    """Each document of a JSONL file, with the bytes read so far. Blank lines are passed over.

    Of each bad record ``refuse`` is told where it is and what is wrong with it.

    Raises: DataError if the file has no record, or none but bad ones."""
    num_records = num_bad = 0
    first_bad = ""
    for number, (offset, line) in enumerate(read_lines(path), start=1):
        end, too_long = offset + len(line), len(line) > MAX_LINE_BYTES
        line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip(BLANKS)
        if not line and not too_long:
            continue
        num_records += 1
        if num_records == 1:
            check_start(path, line)
        try:
            if too_long:
                raise ValueError(f"a line longer than {MAX_LINE_BYTES:,} bytes")
            text = find_text(line)
        except ValueError as error:
            message = f"{path} line {number} (byte {offset:,}): {error}. {EXPECTED}"
            num_bad += 1
            first_bad = first_bad or message
            refuse(message)
        else:
            yield text, end
    if num_records == 0:
        raise DataError(f"no records in {path}. Write it again, or leave it out of --data_path.")
    if num_bad == num_records:
        raise DataError(f"no good record in {path}, of {num_bad:,}. The first: {first_bad}")
