"""A corpus tokenized once: token ids on disk, memory-mapped afterwards.

A cache is a folder whose name is a digest of the data and the tokenizer:

    tokens.bin     all documents' ids in order; 2 bytes per id if the vocabulary allows, else 4
    offsets.bin    int64, where each document begins in tokens.bin, and where the last one ends
    bytes.bin      int64, the length of each document's text (of conversations, of what is learned)
                   in UTF-8 bytes
    hashes.bin     int32, a hash of each document's text, which decides whether it is held out
    mask.bin       of conversations: a byte per id, 1 if it is learned
    labels.bin     of conversations: int64, how many ids of each document are learned
    meta.json      counts, digests, and the first bad records that were skipped

Building and reading a cache take the same main memory, however large the corpus is.
``scripts/prepare_data.py`` builds one ahead of training.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import uuid
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.records import (
    FORMATS,
    TEXT,
    TEXT_COLUMN,
    Content,
    DataError,
    endings_of,
    find_files,
    read_documents,
    text_content,
)

FORMAT = 2  # part of every cache's name: raise it when the meaning of the files changes
BATCH_BYTES = 2 * 2**20  # of text encoded per call: enough for all cores, little to hold in memory
BYTES_PER_TEXT = 100  # and what each text takes besides, so that many short ones end a batch, too
DEFAULT_CACHE_DIR = "dataset/cache"
FILES = ("tokens.bin", "offsets.bin", "bytes.bin", "hashes.bin")
MASK_FILES = ("mask.bin", "labels.bin")
LOCK = ".lock"  # in the folder of a cache that is being built
DAYS_WITHOUT_LOCK = 7  # after which such a folder counts as abandoned: its disk has no locks,
DAYS_ELSEWHERE = 1  # or it can be locked, but is another machine's
NEVER_HELD_OUT = b"\xff\xff\xff\x7f"  # the largest int32
Encoded = tuple[list[str], list[list[int]]]  # texts, and the ids of each


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The BOS, EOS and padding ids of any tokenizer; EOS stands in for those it lacks.

    Raises: DataError if it has no EOS, as the end of a document could not be marked."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("--tokenizer_path: the tokenizer has no EOS token. Set eos_token in it.")
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    return (eos if bos is None else bos), eos, (eos if pad is None else pad)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_data(files: list[Path], content: Content = TEXT) -> str:
    """SHA-256 of the files' bytes in order and of how they are read.

    Dates do not count, nor do names except for their endings."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(sha256_of_file(path)))
        name, _ = endings_of(path)
        column = content.name if FORMATS[name].has_columns else ""
        if (name, column) != ("jsonl", TEXT_COLUMN):  # from before there were others
            digest.update(f"{name} {column}".encode())
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides how a text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules}{special_ids(tokenizer)}".encode()).hexdigest()


@dataclass
class TokenCache:
    """An open cache. Its arrays are memory-mapped: a page is read when it is first used."""

    folder: Path
    meta: dict[str, Any]
    tokens: Tensor  # (num_tokens,) int16 or int32, to be read with ``unsigned``
    offsets: Tensor  # (num_documents + 1,) int64
    num_bytes: Tensor  # (num_documents,) int64
    hashes: Tensor  # (num_documents,) int32
    mask: Tensor | None = None  # (num_tokens,) bool, of conversations
    labels: Tensor | None = None  # (num_documents,) int64
    # Tokens, offsets and mask on a device that makes rows.
    moved: tuple[Tensor, Tensor, Tensor | None] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> "TokenCache":
        """Map the files of a finished cache. Raises: DataError if one of them has a wrong size."""
        folder = Path(folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        num = meta["num_documents"]
        has_mask = MASK_FILES[0] in meta["sha256"]
        id_type = torch.int16 if meta["bytes_per_id"] == 2 else torch.int32

        def mapped(name: str, size: int, dtype: torch.dtype) -> Tensor:
            found, expected = (folder / name).stat().st_size, size * dtype.itemsize
            if found != expected:
                raise DataError(
                    f"{folder / name} has {found:,} bytes, expected {expected:,}. "
                    f"Delete {folder}; it will be rebuilt."
                )
            return torch.from_file(str(folder / name), shared=False, size=size, dtype=dtype)

        return cls(
            folder=folder,
            meta=meta,
            tokens=mapped("tokens.bin", meta["num_tokens"], id_type),
            offsets=mapped("offsets.bin", num + 1, torch.int64),
            num_bytes=mapped("bytes.bin", num, torch.int64),
            hashes=mapped("hashes.bin", num, torch.int32),
            mask=mapped("mask.bin", meta["num_tokens"], torch.bool) if has_mask else None,
            labels=mapped("labels.bin", num, torch.int64) if has_mask else None,
        )

    def ids(self, document: int) -> Tensor:
        """The token ids of one document, (length,) int64."""
        return unsigned(self.tokens[self.offsets[document] : self.offsets[document + 1]])

    def text(self, document: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of one document, decoded from its ids."""
        return str(tokenizer.decode(self.ids(document)))  # typed as one text or several

    def __reduce__(self) -> tuple:
        """Loader processes map the files themselves, whichever way they are started."""
        return TokenCache.open, (self.folder,)


def unsigned(ids: Tensor) -> Tensor:
    """Token ids as stored, (...) int16 or int32 -> (...) int64."""
    return ids.to(torch.int64) & (2 ** (8 * ids.itemsize) - 1)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text. No special tokens are added; those written in a text are recognised.

    The tokenizers library uses all cores, and releases Python's lock meanwhile."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


@dataclass
class BadRecords:
    """Called with a message for each bad record: raises at the first one, or counts them all."""

    skip: bool
    num: int = 0
    examples: list[str] = field(default_factory=list)  # the first three

    def __call__(self, message: str) -> None:
        if not self.skip:
            refuse(message)
        self.num += 1
        if self.num <= 3:
            self.examples.append(message)


def refuse(message: str) -> NoReturn:
    """Raise for a bad record, found now or when the cache was built."""
    raise DataError(f"{message} Correct it, or skip such records with --bad_records skip.")


def text_batches(
    files: list[Path], content: Content, bad: BadRecords, bar: tqdm
) -> Iterator[list[str]]:
    """All documents in order, in lists of about BATCH_BYTES; ``bar`` counts the files' bytes.

    What counts is the texts' own bytes: files may be small, or hold far less than they say."""
    texts: list[str] = []
    size = 0
    for path in files:
        bytes_read = reported = 0
        for text, bytes_read in read_documents(path, bad, content):
            texts.append(text)
            size += len(text.encode("utf-8")) + BYTES_PER_TEXT
            if size >= BATCH_BYTES:
                bar.update(bytes_read - reported)
                reported = bytes_read
                yield texts
                texts, size = [], 0
        bar.update(bytes_read - reported)
    yield texts


def encoded_batches(
    tokenizer: PreTrainedTokenizerBase, batches: Iterable[list[str]]
) -> Generator[Encoded, None, None]:
    """The batches and their ids, in order; while the caller writes one, the next is encoded."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        ahead: deque = deque()
        for texts in batches:
            ahead.append((texts, pool.submit(encode, tokenizer, texts)))
            if len(ahead) == 2:
                texts, future = ahead.popleft()
                yield texts, future.result()
        for texts, future in ahead:
            yield texts, future.result()
    finally:  # after an error or a signal, wait only for the batch that is being encoded
        pool.shutdown(cancel_futures=True)


@dataclass
class Counts:
    """What was written to a cache, as in its meta.json."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_empty: int = 0  # documents without text, which are dropped
    num_control_tokens: int = 0
    num_labels: int = 0  # of conversations: ids that are learned
    num_texts: int = 0  # among conversations: documents that are none


def write_cache(
    folder: Path,
    files: list[Path],
    content: Content,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRecords,
) -> dict[str, Any]:
    """Tokenize ``files`` into ``folder``, a few batches in memory at a time. Returns: counts."""
    fits_two_bytes = max(tokenizer.get_vocab().values()) < 2**16
    with contextlib.ExitStack() as stack:
        outputs: list[BinaryIO] = [
            stack.enter_context((folder / name).open("wb")) for name in files_of(content)
        ]
        size = sum(path.stat().st_size for path in files)
        bar = stack.enter_context(  # disable=None: no bar unless stderr is a terminal
            tqdm(total=size, desc="tokenizing", unit="B", unit_scale=1, leave=False, disable=None)
        )
        batches = encoded_batches(tokenizer, text_batches(files, content, bad, bar))
        stack.enter_context(contextlib.closing(batches))  # ends its thread, whatever happens
        id_code = "H" if fits_two_bytes else "I"
        control_ids = set(tokenizer.all_special_ids) if content.is_text else set()
        counts = write_documents(outputs, batches, control_ids, id_code, content.marks)
        for file in outputs:
            file.flush()
            os.fsync(file.fileno())
    bytes_per_id = 2 if fits_two_bytes else 4
    found = {"bytes_per_id": bytes_per_id, "num_bad": bad.num, "bad_examples": bad.examples}
    return asdict(counts) | found


def files_of(content: Content) -> tuple[str, ...]:
    """The names of a cache's files, without meta.json."""
    return FILES if content.is_text else FILES + MASK_FILES


def write_documents(
    outputs: list[BinaryIO],
    batches: Iterable[Encoded],
    control_ids: set[int],
    id_code: str,
    marks: Any = None,
) -> Counts:
    """Append all documents to the open files of a cache, in the order of ``files_of``.

    Args: marks: of conversations, see dataset/conversations.py."""
    tokens, offsets, sizes, hashes, *masks = outputs
    counts = Counts()
    offsets.write(array("q", [0]).tobytes())
    for texts, encoded in batches:
        for text, ids in zip(texts, encoded, strict=True):
            if not text.strip() or not ids:
                counts.num_empty += 1
                continue
            data = text.encode("utf-8")
            counts.num_documents += 1
            counts.num_tokens += len(ids)
            num_bytes = marks.num_bytes(text) if marks else len(data)
            counts.num_bytes += num_bytes
            counts.num_control_tokens += sum(map(control_ids.__contains__, ids))
            tokens.write(array(id_code, ids).tobytes())
            offsets.write(array("q", [counts.num_tokens]).tobytes())
            sizes.write(array("q", [num_bytes]).tobytes())
            if marks and marks.is_plain(ids):
                counts.num_texts += 1
                hashes.write(NEVER_HELD_OUT)
            else:
                hashes.write(hashlib.blake2b(data, digest_size=4).digest())
            if marks:
                mask = bytearray(len(ids))
                for first, end in marks.spans(ids):
                    mask[first:end] = b"\1" * (end - first)
                masks[0].write(mask)
                masks[1].write(array("q", [sum(mask)]).tobytes())
                counts.num_labels += sum(mask)
    return counts


def write_meta(folder: Path, meta: dict[str, Any], files: tuple[str, ...] = FILES) -> None:
    """Complete a cache: counts, digests of its files, and a digest of both together."""
    digests = {name: sha256_of_file(folder / name) for name in files}
    meta = meta | {"sha256": digests}
    digests["meta.json"] = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def damaged_file(folder: Path) -> str | None:
    """The first file of a cache that differs from what was written; None if there is none."""
    try:
        strange = (path.name for path in folder.glob("*") if path.exists() and not path.is_file())
        if name := next(strange, None):  # a pipe would wait for ever, a device never end
            return name
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        own_digest = meta["sha256"].pop("meta.json")
        if own_digest != hashlib.sha256(json.dumps(meta).encode()).hexdigest():
            return "meta.json"
        digests = meta["sha256"].items()
        return next((n for n, digest in digests if sha256_of_file(folder / n) != digest), None)
    except FileNotFoundError as error:
        return Path(error.filename).name
    except OSError as error:  # a bad sector
        return Path(error.filename or "tokens.bin").name
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "meta.json"  # no JSON, or of another structure


def is_finished(folder: Path) -> bool:
    """Whether a complete cache is there. A damaged one is removed with a warning."""
    if not folder.exists():
        return False
    if (name := damaged_file(folder)) is None:
        return True
    print(f"warning: token cache {folder} is damaged ({name}); rebuilding it", file=sys.stderr)
    aside = private_folder(folder.parent, "damaged")  # nobody may open it when half of it is gone
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
    return False


def private_folder(cache_dir: Path, kind: Literal["building", "damaged"]) -> Path:
    """A new name for a cache that is not complete, or no longer. It tells the machine, and no two
    are the same: containers may share a host's name and count their processes from 1."""
    return cache_dir / f".{kind}-{socket.gethostname()}-{os.getpid()}.{uuid.uuid4().hex[:8]}"


def lock(file: BinaryIO, shared: bool = False) -> bool | None:
    """Whether an open file could be locked until it is closed; None: there are no locks here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: some network disks
        return None
    return True


def open_without_waiting(path: str, flags: int) -> int:
    """For open(opener=...): a pipe of that name must not wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def is_abandoned(building: Path) -> bool:
    """Whether the process that was building a cache here has ended.

    If its lock can be had, it has; unless it ran on another machine, which may not see our locks.
    Without a lock in it, a folder counts as abandoned when nothing in it changed for long."""
    try:
        held = None
        if (building / LOCK).exists():
            with open(building / LOCK, "rb", opener=open_without_waiting) as file:
                if file.read(1):  # it was locked once, see new_folder
                    held = lock(file, shared=True)
        if held is False:
            return False
        if held and building.name.rpartition("-")[0] == f".building-{socket.gethostname()}":
            return True
        changed = max(path.lstat().st_mtime for path in (building, *building.iterdir()))
    except OSError:  # another process removed it, or it is not ours to read
        return False
    return time.time() - changed > (DAYS_ELSEWHERE if held else DAYS_WITHOUT_LOCK) * 86_400


def remove_leftovers(cache_dir: Path) -> None:
    """Delete the private folders of processes that were killed."""
    for folder in cache_dir.glob(".damaged-*"):  # whoever set it aside wanted it deleted
        shutil.rmtree(folder, ignore_errors=True)
    for folder in cache_dir.glob(".building-*"):
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to; it becomes ``folder`` if the block ends without an exception."""
    building = private_folder(folder.parent, "building")
    try:
        building.mkdir()
        with (building / LOCK).open("wb", buffering=0) as file:
            if lock(file):
                file.write(b"1")  # only now: an empty one may be about to be locked
            yield building
            file.truncate(0)
        (building / LOCK).unlink()
        try:
            building.rename(folder)  # the commit: a cache is whole or absent
        except OSError:
            if not folder.exists():  # otherwise another run was faster, with the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Bytes and nanoseconds; if either changes, the content may have changed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def check_cache_dir(cache_dir: str | Path) -> None:
    """Raises: DataError if its name is not UTF-8, as torch maps only files whose names are."""
    try:
        str(cache_dir).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"--cache_dir {str(cache_dir)!a} is not UTF-8. Choose a folder whose name is."
        ) from None


def build_token_cache(
    data_path: str | Path | list[str],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    bad_records: str = "stop",
    text_column: str = TEXT_COLUMN,
    content: Content | None = None,
) -> TokenCache:
    """The cache of these files and this tokenizer, which is built if it does not exist yet.

    Args:
        data_path: see ``find_files``.
        bad_records: "stop" raises at the first; "skip" leaves them out and counts them in ``meta``.
        content: what documents are; by default the text of ``text_column``.
    Raises: DataError if a file is missing or unusable or changes meanwhile, if there is a bad
        record that must not be skipped, even if an earlier run did, if there is no document, or if
        ``cache_dir`` has a name that cannot be used."""
    check_cache_dir(cache_dir)
    files = find_files(data_path)
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()  # a tokenizer's file may enable both, but documents stay whole
        backend.no_padding()
    before = [size_and_mtime(path) for path in files]
    content = content or text_content(text_column)
    data = digest_of_data(files, content)
    digests = {"data": data, "tokenizer": digest_of_tokenizer(tokenizer)}
    key = hashlib.sha256(f"{FORMAT}{digests}".encode()).hexdigest()[:24]
    folder = Path(cache_dir) / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    if not is_finished(folder):
        bad = BadRecords(skip=bad_records == "skip")
        with new_folder(folder) as building:
            counts = write_cache(building, files, content, tokenizer, bad)
            for path, old in zip(files, before, strict=True):
                if size_and_mtime(path) != old:  # the digest may be that of another text
                    raise DataError(f"{path} changed while it was being read. Start again.")
            if counts["num_documents"] == 0:
                raise DataError(f"--data_path {files[0]}: no document with text in it.")
            meta = {"format": FORMAT, "digests": digests} | counts
            write_meta(building, meta, files_of(content))
    cache = TokenCache.open(folder)
    if cache.meta["num_bad"] and bad_records != "skip":
        refuse(cache.meta["bad_examples"][0])
    return cache
