"""Documents from files: JSONL and text, also packed, and parquet.

JSONL is read strictly: each line is a document, or a bad record named by file, line and byte. What
Python's json lets pass and a corpus should not have (a key twice, NaN, half of a surrogate pair) is
a bad record. Memory holds one document, and of one too long its start.
"""

import codecs
import contextlib
import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

MAX_LINE_BYTES = 16 * 2**20  # end of line included; a longer one has most likely lost its newlines
KINDS = ("jsonl", "txt", "parquet")  # by a file's name; jsonl if it ends otherwise
PACKED = ("gz", "zst")
ENDINGS = (".parquet", *(f".{k}{p}" for k in ("jsonl", "txt") for p in ("", ".gz", ".zst")))
TEXT_COLUMN = "text"
WAY_TO_DATA = (
    "Download MiniMind's corpus from https://huggingface.co/datasets/jingyaogong/minimind_dataset "
    "into dataset/, or try --preset demo."
)
BLANKS = b" \t\r\n"  # JSON's own; bytes.strip() alone would drop control characters as well
TYPE_NAMES = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
NOT_TEXT = {  # what a file begins with -> what it is and what to do about it
    b"\x1f\x8b": "gzip; end its name in .gz",
    b"\x28\xb5\x2f\xfd": "zstd; end its name in .zst",
    b"PAR1": "parquet; end its name in .parquet",
    codecs.BOM_UTF32_LE: "UTF-32; convert it to UTF-8",  # before UTF-16: it begins as that does
    codecs.BOM_UTF32_BE: "UTF-32; convert it to UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16; convert it to UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; convert it to UTF-8",
}
# Where a record is, how many bytes of the file were read with it, its text or what is wrong.
Found = tuple[str, int, str | ValueError]


class DataError(ValueError):
    """The data cannot be trained on as it is; the message names file and line."""

    exit_status = 3


def stop(message: str) -> NoReturn:
    """What ``read_documents`` does about a bad record unless told otherwise."""
    raise DataError(message)


def expected(text_column: str = TEXT_COLUMN) -> str:
    """What a line should be, for messages."""
    return f'Expected one JSON object a line, in UTF-8, with a string "{text_column}": ' \
           f'{{"{text_column}": "..."}}.'


def find_files(data_path: str | list[str]) -> list[Path]:
    """The files that ``--data_path`` means: as given, a pattern's, or a folder's of known endings.

    Raises: DataError if one is missing, or if a folder or pattern holds none."""
    files: list[Path] = []
    for given in [data_path] if isinstance(data_path, str | Path) else data_path:
        path = Path(given)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS) and p.is_file())
            if not found:
                raise DataError(
                    f"--data_path {given}: the folder holds no file that ends in "
                    f"{', '.join(ENDINGS)}."
                )
        elif path.is_file():
            found = [path]
        else:
            found = [p for p in map(Path, sorted(glob.glob(str(given), recursive=True)))
                     if p.is_file()]
            if not found:
                seen_from = f"Expected a file, a folder or a pattern, seen from {Path.cwd()}."
                way = WAY_TO_DATA if path.name.startswith("pretrain_t2t") else seen_from
                raise DataError(f"--data_path {given}: no such file. {way}")
        files += found
    return files


def kind_of(path: Path) -> tuple[str, str]:
    """What a file holds, one of KINDS, and how it is packed, one of PACKED or "": by its name."""
    name, packed = path.name, ""
    for ending in PACKED:
        if name.endswith(f".{ending}"):
            name, packed = name.removesuffix(f".{ending}"), ending
    kind = name.rpartition(".")[2]
    return (kind if kind in KINDS else "jsonl"), packed


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


def find_text(line: bytes, text_column: str) -> str:
    """The document in one line. Raises: ValueError with what was found in its place."""
    record = parse(line)
    if not isinstance(record, dict):
        raise ValueError(f"found a JSON {TYPE_NAMES.get(type(record), 'number')}")
    if text_column not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f'no "{text_column}"; its keys: {keys:.80}')
    if not isinstance(text := record[text_column], str):
        raise ValueError(f'"{text_column}" is a JSON {TYPE_NAMES.get(type(text), "number")}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f'half of a surrogate pair (\\ud800-\\udfff) in "{text_column}"'
        ) from None
    return text


def check_start(path: Path, line: bytes) -> None:
    """Raises: DataError if a file's first bytes show that the whole file is in another form.

    To skip bad records is no way out then: the lines that happen to parse are no corpus."""
    for start, what in NOT_TEXT.items():
        if line.startswith(start):
            raise DataError(f"{path} is {what}.")


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes that a file holds, and the file itself: its position tells how much was read.

    Raises: DataError if it cannot be unpacked."""
    _, packed = kind_of(path)
    damages: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    with path.open("rb") as file:
        stream = file
        if packed == "gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file))
        elif packed == "zst":
            try:
                from compression import zstd  # of Python 3.14
            except ImportError:
                try:
                    from backports import zstd
                except ImportError:
                    raise DataError(f"{path}: zstd needs: pip install backports.zstd") from None
            damages += (zstd.ZstdError,)
            stream = io.BufferedReader(zstd.ZstdFile(file))
        try:
            yield stream, file
        except damages as error:
            raise DataError(
                f"{path} cannot be unpacked: {str(error).splitlines()[0].rstrip('.')}. Was it "
                f"copied whole?"
            ) from None


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Where each line begins in what the file holds, how many bytes of the file were read, and the
    line: no more than MAX_LINE_BYTES + 1 bytes of it."""
    offset = 0
    with unpacked(path) as (stream, file):
        while piece := stream.readline(MAX_LINE_BYTES + 1):
            begin, line = offset, piece
            offset += len(piece)
            while not piece.endswith(b"\n") and (piece := stream.readline(2**20)):
                offset += len(piece)
            yield begin, offset if stream is file else file.tell(), line


def jsonl_records(path: Path, text_column: str) -> Iterator[Found]:
    """One a line; blank lines are passed over."""
    first = True
    for number, (offset, done, line) in enumerate(read_lines(path), start=1):
        too_long = len(line) > MAX_LINE_BYTES
        line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip(BLANKS)
        if not line and not too_long:
            continue
        if first:
            check_start(path, line)
            if line.lstrip(BLANKS).startswith(b"[") and not line.endswith(b"]"):
                raise DataError(f"{path} is one JSON array. {expected(text_column)}")
        first = False
        try:
            if too_long:
                raise ValueError(f"a line longer than {MAX_LINE_BYTES:,} bytes")
            found = find_text(line, text_column)
        except ValueError as error:
            found = ValueError(f"{error}. {expected(text_column)}")
        yield f"line {number} (byte {offset:,})", done, found


def txt_records(path: Path, text_column: str) -> Iterator[Found]:
    """Lines up to a blank one, or to the end, are a document; ``text_column`` is of no use here."""
    lines: list[bytes] = []
    size = first_line = first_byte = done = 0

    def document() -> Found:
        where, found = f"line {first_line} (byte {first_byte:,})", b"\n".join(lines)
        if size > MAX_LINE_BYTES:
            reason = f"more than {MAX_LINE_BYTES:,} bytes without a blank line"
            return where, done, ValueError(f"{reason}. One stands between two documents.")
        try:
            return where, done, found.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"byte 0x{found[error.start]:02x} is not UTF-8"
            return where, done, ValueError(f"{reason}. Convert the file to UTF-8.")

    for number, (offset, so_far, line) in enumerate(read_lines(path), start=1):
        if number == 1:
            check_start(path, line)
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line.rstrip(b"\r\n")
        if line.strip(BLANKS):
            if not size:
                first_line, first_byte = number, offset
            size += len(line) + 1
            if size <= MAX_LINE_BYTES:  # of one too long the rest is not held
                lines.append(line)
            done = so_far
        elif size:
            yield document()
            lines, size = [], 0
    if size:
        yield document()


def parquet_records(path: Path, text_column: str) -> Iterator[Found]:
    """One a row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: parquet needs: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            names, num_rows = file.schema_arrow.names, file.metadata.num_rows
            if text_column not in names:
                raise DataError(
                    f'{path} has no column "{text_column}", but {", ".join(names):.200}. Choose '
                    f"one with --text_column."
                )
            kind = file.schema_arrow.field(text_column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f'{path}: its column "{text_column}" is of {kind}, expected text.')
            number, size = 0, path.stat().st_size
            for batch in file.iter_batches(batch_size=256, columns=[text_column]):
                for value in batch.column(0):
                    number += 1
                    try:
                        found = value.as_py()
                        if found is None:
                            found = ValueError("no text. Expected a string in each row.")
                    except UnicodeDecodeError:
                        found = ValueError("bytes that are not UTF-8")
                    yield f"row {number:,}", size * number // num_rows, found
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read as parquet: {reason:.160}.") from None


READERS = {"jsonl": jsonl_records, "txt": txt_records, "parquet": parquet_records}


def read_documents(
    path: Path, refuse: Callable[[str], None] = stop, text_column: str = TEXT_COLUMN
) -> Iterator[tuple[str, int]]:
    """Each document of a file, with the bytes of it that were read so far.

    Of each bad record ``refuse`` is told where it is and what is wrong with it.

    Raises: DataError if the file has no record, none but bad ones, or cannot be read."""
    num_records = num_bad = 0
    first_bad = ""
    kind, _ = kind_of(path)
    for where, done, found in READERS[kind](path, text_column):
        num_records += 1
        if isinstance(found, ValueError):
            message = f"{path} {where}: {found}"
            num_bad += 1
            first_bad = first_bad or message
            refuse(message)
        else:
            yield found, done
    if num_records == 0:
        raise DataError(f"no records in {path}. Write it again, or leave it out of --data_path.")
    if num_bad == num_records:
        raise DataError(f"no good record in {path}, of {num_bad:,}. The first: {first_bad}")
