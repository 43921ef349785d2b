"""Documents from files: JSONL and text, plain or compressed, and parquet.

Each format is one entry of FORMATS and each compression one of COMPRESSIONS. File endings, readers
and the recognition of misnamed files follow from these two tables.

JSONL is read strictly: every line is a document, or a bad record that is reported with its file,
line and byte. What Python's json module accepts but a corpus should not contain (duplicate keys,
NaN, unpaired surrogates) is a bad record. One document is held in memory at a time; of a document
that is too long, only the beginning.
"""

import codecs
import contextlib
import glob
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

# Of a line with its newline (a longer one has most likely lost newlines), or of a row's document.
MAX_LINE_BYTES = 16 * 2**20
TEXT_COLUMN = "text"
WHITESPACE = b" \t\r\n"  # as JSON defines it; bytes.strip() would also drop control characters
JSON_TYPES: dict[type, str] = {
    list: "array",
    dict: "object",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
OTHER_ENCODINGS = {  # by byte order mark
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is the beginning of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
DOWNLOAD_HINT = (
    "Download MiniMind's corpus from https://huggingface.co/datasets/jingyaogong/minimind_dataset "
    "into dataset/, or try --preset demo."
)


class DataError(ValueError):
    """The data cannot be trained on as it is; the message names file and line."""

    exit_status = 3


class Record(NamedTuple):
    """One record of a file, good or bad."""

    text: str | ValueError  # the document, or where the bad record is and what is wrong with it
    bytes_read: int  # of the file, up to the end of this record


class Content(NamedTuple):
    """Where in a record its document is: a text, or a conversation (dataset/conversations.py)."""

    document: Callable[[dict[str, object]], str]  # of a record; raises ValueError
    columns: tuple[str, ...]  # which it reads; a file has at least one of them
    example: str  # of a line
    what: str  # of a value
    name: str  # tells contents apart in the digest of the data
    marks: Any = None  # of conversations: tells what of a document is learned; None: all

    @property
    def is_text(self) -> bool:
        """Whether it is one column of text."""
        return self.marks is None


class Format(NamedTuple):
    """How the documents of a file are read; its ending is the key in FORMATS."""

    read: Callable[[Path, Content], Iterator[Record]]
    is_text: bool  # lines of text; the file may be compressed
    has_columns: bool  # a record is more than a text
    signature: bytes = b""  # the first bytes of every such file, if there is one


# What a compressed file contains, and the exceptions that reading it raises if it is damaged.
Opened = tuple[BinaryIO, tuple[type[Exception], ...]]


class Compression(NamedTuple):
    """How a file is decompressed; its ending is the key in COMPRESSIONS."""

    name: str
    signature: bytes  # the first bytes of every such file
    open: Callable[[BinaryIO, Path], Opened]  # from the open file and, for messages, its path


def open_gzip(file: BinaryIO, path: Path) -> Opened:
    """For COMPRESSIONS."""
    content = io.BufferedReader(gzip.GzipFile(fileobj=file))
    return content, (gzip.BadGzipFile, EOFError, zlib.error)


def open_zstd(file: BinaryIO, path: Path) -> Opened:
    """For COMPRESSIONS. Raises: DataError if neither Python nor a package can read zstd."""
    try:
        from compression import zstd  # since Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise DataError(f"{path}: zstd needs: pip install backports.zstd") from None
    return io.BufferedReader(zstd.ZstdFile(file)), (zstd.ZstdError, EOFError)


COMPRESSIONS = {
    "gz": Compression("gzip", b"\x1f\x8b", open_gzip),
    "zst": Compression("zstd", b"\x28\xb5\x2f\xfd", open_zstd),
}


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content of a file, and the file itself, whose position tells how much of it was read.

    Raises: DataError if it cannot be decompressed."""
    _, compression = endings_of(path)
    with path.open("rb") as file:
        if compression is None:
            yield file, file
            return
        content, damage = COMPRESSIONS[compression].open(file, path)
        try:
            yield content, file
        except damage as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"{path} cannot be decompressed: {reason}. Was it copied completely?"
            ) from None


class Line(NamedTuple):
    """One line of a text file."""

    number: int  # from 1
    offset: int  # of its first byte in the content
    size: int  # bytes, newline included
    data: bytes  # the first MAX_LINE_BYTES + 1 of these bytes
    bytes_read: int  # of the file, up to the end of this line

    @property
    def place(self) -> str:
        """For messages."""
        return f"line {self.number} (byte {self.offset:,})"


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a text file, without a byte order mark at its start.

    Raises: DataError if the file cannot be decompressed, or see ``check_is_text``."""
    end = 0
    with decompressed(path) as (content, file):
        for number in itertools.count(1):
            data = piece = content.readline(MAX_LINE_BYTES + 1)
            offset, end = end, end + len(data)
            while piece and not piece.endswith(b"\n"):
                piece = content.readline(2**20)
                end += len(piece)
            if not data:
                return
            if number == 1:
                check_is_text(path, data)
                data = data.removeprefix(codecs.BOM_UTF8)
            bytes_read = end if content is file else file.tell()
            yield Line(number, offset, end - offset, data, bytes_read)


def check_is_text(path: Path, start: bytes) -> None:
    """Raises: DataError if its first bytes show that the file is in another format or encoding.

    Skipping bad records would not help: the lines that happen to parse are not the corpus."""
    for signature, what in NOT_TEXT.items():
        if start.startswith(signature):
            raise DataError(f"{path} is {what}.")


def object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises: ValueError if a key occurs twice, as either value may be meant."""
    record = dict(pairs)
    if len(record) < len(pairs):
        duplicate = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {duplicate!r:.40}")
    return record


def reject_constant(name: str) -> NoReturn:
    """Python reads NaN and Infinity as floats; JSON has no such numbers."""
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(
    object_pairs_hook=object_without_duplicates, parse_constant=reject_constant
)


def parse_json(line: bytes) -> object:
    """The JSON value of a line. Raises: ValueError that says what is wrong with it."""
    if line.startswith(codecs.BOM_UTF8):
        raise ValueError("a byte order mark, which is allowed only at the start of a file")
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{found} is not UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            found = f"extra data after the first value at column {error.colno}"
            raise ValueError(f"{found} (missing newline?)") from None
        found = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise ValueError(f"not valid JSON: {found}") from None
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond Python's limits
        raise ValueError(f"cannot be read: {error}") from None


def record_of(line: bytes) -> dict[str, object]:
    """The object in a line of JSONL. Raises: ValueError that says what was found instead."""
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"found a JSON {JSON_TYPES.get(type(record), 'number')}")
    return record


def text_of(text_column: str, record: dict[str, object]) -> str:
    """The text in a record. Raises: ValueError that says what was found instead."""
    if text_column not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f'no "{text_column}"; its keys: {keys:.80}')
    if not isinstance(text := record[text_column], str):
        raise ValueError(f'"{text_column}" is a JSON {JSON_TYPES.get(type(text), "number")}')
    return encodable(text, text_column)


def encodable(text: str, column: str) -> str:
    """The text. Raises: ValueError if UTF-8 has no bytes for it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f'an unpaired surrogate (\\ud800-\\udfff) in "{column}"') from None
    return text


def text_content(text_column: str = TEXT_COLUMN) -> Content:
    """Documents that are a text each."""
    document = partial(text_of, text_column)
    example = f'{{"{text_column}": "..."}}'
    return Content(document, (text_column,), example, f'a string "{text_column}"', text_column)


TEXT = text_content()


def expected_line(content: Content | str = TEXT_COLUMN) -> str:
    """What a line of JSONL should be, for messages."""
    content = text_content(content) if isinstance(content, str) else content
    return f"Expected one JSON object per line, in UTF-8, with {content.what}: {content.example}."


def begins_an_array(line: bytes) -> bool:
    """Whether a file of this first line is one JSON array, on many lines or on this one."""
    start = line.lstrip(WHITESPACE)
    is_of_records = start[1:].lstrip(WHITESPACE).startswith(b"{")
    return start.startswith(b"[") and (is_of_records or not line.endswith(b"]"))


def read_jsonl(path: Path, content: Content) -> Iterator[Record]:
    """One record per line; blank lines are skipped."""
    is_first = True
    for line in read_lines(path):
        data, is_too_long = line.data.rstrip(WHITESPACE), line.size > MAX_LINE_BYTES
        if not data and not is_too_long:
            continue
        if is_first and begins_an_array(data):
            raise DataError(
                f"{path} is a JSON array. {expected_line(content)} "
                f"One record per line is what this writes: jq -c '.[]' {path.name}"
            )
        is_first = False
        try:
            if is_too_long:
                raise ValueError(f"a line longer than {MAX_LINE_BYTES:,} bytes")
            text = content.document(record_of(data))
        except ValueError as error:
            text = ValueError(f"{line.place}: {error}. {expected_line(content)}")
        yield Record(text, line.bytes_read)


def read_txt(path: Path, content: Content) -> Iterator[Record]:
    """One record per paragraph, i.e. lines up to a blank line or the end of the file."""
    if not content.is_text:
        raise DataError(f"{path} is plain text. {expected_line(content)}")

    def is_blank(line: Line) -> bool:
        return line.size <= MAX_LINE_BYTES and not line.data.strip(WHITESPACE)

    for blank, lines in itertools.groupby(read_lines(path), is_blank):
        if not blank:
            yield paragraph(lines)


def paragraph(lines: Iterator[Line]) -> Record:
    """The record that all these lines make."""
    first = last = next(lines)
    parts, size = [], 0
    for last in itertools.chain([first], lines):
        size += last.size
        if size <= MAX_LINE_BYTES:
            parts.append(last.data.rstrip(b"\r\n"))
    data = b"\n".join(parts)
    if size > MAX_LINE_BYTES:
        reason = f"more than {MAX_LINE_BYTES:,} bytes without a blank line"
        text = ValueError(f"{first.place}: {reason}. Expected one between two documents.")
    else:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"byte 0x{data[error.start]:02x} is not UTF-8"
            text = ValueError(f"{first.place}: {reason}. Convert the file to UTF-8.")
    return Record(text, last.bytes_read)


def read_parquet(path: Path, content: Content) -> Iterator[Record]:
    """One record per row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: parquet needs: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            names, num_rows = file.schema_arrow.names, file.metadata.num_rows
            columns = [name for name in content.columns if name in names]
            if not columns:
                raise DataError(
                    f'{path} has no column "{content.columns[0]}"; its columns: '
                    f"{', '.join(names):.200}. Choose one with --text_column."
                )
            if content.is_text:
                kind = file.schema_arrow.field(columns[0]).type
                if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                    raise DataError(
                        f'{path}: its column "{columns[0]}" is of {kind}, expected text.'
                    )
            number, size = 0, path.stat().st_size
            # Few rows at a time: each may be as long as MAX_LINE_BYTES.
            for batch in file.iter_batches(batch_size=16, columns=columns):
                for values in zip(*batch.columns, strict=True):
                    number += 1
                    yield Record(
                        row_of(content, columns, values, number), size * number // num_rows
                    )
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read as parquet: {reason:.160}.") from None


def row_of(
    content: Content, columns: list[str], values: tuple[Any, ...], number: int
) -> str | ValueError:
    """The document in a row of parquet, or what is wrong with it."""
    try:
        record = {name: value.as_py() for name, value in zip(columns, values, strict=True)}
        if content.is_text and record[columns[0]] is None:
            return ValueError(f"row {number:,}: no text. Expected a string in each row.")
        text = content.document(record)
        if (size := len(text.encode("utf-8"))) > MAX_LINE_BYTES:
            found = f"a document of {size:,} bytes, expected up to {MAX_LINE_BYTES:,}"
            return ValueError(f"row {number:,}: {found}. Split it into several rows.")
        return text
    except UnicodeDecodeError:
        return ValueError(f"row {number:,}: bytes that are not UTF-8")
    except ValueError as error:
        return ValueError(f"row {number:,}: {error}. Expected {content.what}: {content.example}.")


FORMATS = {
    "jsonl": Format(read_jsonl, is_text=True, has_columns=True),
    "txt": Format(read_txt, is_text=True, has_columns=False),
    "parquet": Format(read_parquet, is_text=False, has_columns=True, signature=b"PAR1"),
}
ENDINGS = tuple(
    f".{name}{compressed}"
    for name, form in FORMATS.items()
    for compressed in ("", *(f".{ending}" for ending in COMPRESSIONS if form.is_text))
)
TO_PARQUET = 'With the datasets package: {}.to_parquet("corpus.parquet").'
UNPACK = (
    f"Unpack it; of compressed files, {' and '.join(c.name for c in COMPRESSIONS.values())} are."
)
OTHER_ENDINGS = {  # that are not read -> how to make a file that is
    **dict.fromkeys(("md", "markdown"), "Rename it to .txt, which is cut at blank lines."),
    "csv": TO_PARQUET.format('Dataset.from_csv("corpus.csv")'),
    "tsv": TO_PARQUET.format('Dataset.from_csv("corpus.tsv", sep="\\t")'),
    "arrow": TO_PARQUET.format('load_from_disk("folder")'),
    **dict.fromkeys(("xz", "bz2", "zip", "7z", "tar", "tgz"), UNPACK),
}
NOT_TEXT = {  # the first bytes of a file -> what it is, and what to do about it
    **{
        form.signature: f"{name}; end its name in .{name}"
        for name, form in FORMATS.items()
        if form.signature
    },
    **{
        compression.signature: f"{compression.name}; end its name in .{ending}"
        for ending, compression in COMPRESSIONS.items()
    },
    **{mark: f"{name}; convert it to UTF-8" for mark, name in OTHER_ENCODINGS.items()},
}


def endings_of(path: Path) -> tuple[str, str | None]:
    """The keys in FORMATS and COMPRESSIONS (None: not compressed) that a file's name ends in.

    A file whose name ends otherwise is taken for JSONL, but see ``check_ending``."""
    name, _, compression = path.name.rpartition(".")
    if compression not in COMPRESSIONS:
        name, compression = path.name, None
    form = name.rpartition(".")[2]
    return (form if form in FORMATS else "jsonl"), compression


def check_ending(path: Path) -> None:
    """Raises: DataError if a file's name ends as those of a format that is not read."""
    _, compression = endings_of(path)
    ending = path.name.removesuffix(f".{compression}").rpartition(".")[2].lower()
    if ending in OTHER_ENDINGS:
        raise DataError(
            f"--data_path {path}: files in .{ending} are not read, only those in "
            f"{', '.join(ENDINGS)}. {OTHER_ENDINGS[ending]}"
        )


def find_files(data_path: str | Path | list[str]) -> list[Path]:
    """The files that ``--data_path`` names: files, folders (whose files of known endings are taken)
    and glob patterns.

    Raises: DataError if a file does not exist or is of a format that is not read, or if a folder or
    pattern contains none."""
    given = [data_path] if isinstance(data_path, str | Path) else data_path
    return [file for name in given for file in files_at(name)]


def files_at(name: str | Path) -> list[Path]:
    """The files that one name means, see ``find_files``."""
    path = Path(name)
    if path.is_dir():
        inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
        files = [p for p in inside if p.name.endswith(ENDINGS)]
        for other in [] if files else inside:
            check_ending(other)
        problem = f"no file in this folder ends in {', '.join(ENDINGS)}."
    else:
        found = (
            [path] if path.is_file() else map(Path, sorted(glob.glob(f"{name}", recursive=True)))
        )
        files = [p for p in found if p.is_file()]
        for file in files:
            check_ending(file)
        problem = f"no such file. {instead_of_missing(f'{name}')}"
    if not files:
        raise DataError(f"--data_path {name}: {problem}")
    return files


def instead_of_missing(name: str) -> str:
    """What to do about a path that does not exist."""
    path = Path(name)
    if path.name.startswith(("pretrain_t2t", "sft_t2t", "dpo")):  # MiniMind's
        return DOWNLOAD_HINT
    if "://" in name:
        return "Expected files of this machine. Copy them here first: hf download, aws s3 cp, ..."
    expected = f"Expected a file, a folder or a pattern, relative to {Path.cwd()}."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists():
        return (
            f"{expected} A data set of the hub is copied here first: hf download {name} "
            f"--repo-type dataset --local-dir dataset/{path.name}"
        )
    return expected


def stop(message: str) -> NoReturn:
    """What ``read_documents`` does with a bad record by default."""
    raise DataError(message)


def read_documents(
    path: Path, on_bad_record: Callable[[str], None] = stop, content: Content = TEXT
) -> Iterator[tuple[str, int]]:
    """The documents of a file, each with the number of the file's bytes read so far.

    ``on_bad_record`` is called with a message for each bad record, which is then skipped.

    Raises: DataError if the file has no record or only bad ones, or cannot be read."""
    num_records = num_bad = 0
    first_bad = ""
    name, _ = endings_of(path)
    for text, bytes_read in FORMATS[name].read(path, content):
        num_records += 1
        if isinstance(text, ValueError):
            message = f"{path} {text}"
            num_bad += 1
            first_bad = first_bad or message
            on_bad_record(message)
        else:
            yield text, bytes_read
    if num_records == 0:
        raise DataError(f"no records in {path}. Write it again, or remove it from --data_path.")
    if num_bad == num_records:
        raise DataError(f"no good record among the {num_bad:,} in {path}. The first: {first_bad}")
