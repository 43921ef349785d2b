"""Text files, tokenized once: ids on disk, memory-mapped afterwards.

    python -m dataset.token_cache --data_path corpus.jsonl    # ahead, on a machine that costs less

A cache is a folder named after the content of the data and of the tokenizer:

    tokens.bin     every document's ids, one after another; two bytes each while the vocabulary fits
    offsets.bin    int64, where each document begins in tokens.bin, and the end of the last
    bytes.bin      int64, the length of each document's text in UTF-8 bytes
    hashes.bin     int32, a hash of each document's text: it decides which are held out
    meta.json      counts and digests, and what was left out

Main memory stays flat while it is built and while it is read, however large the corpus.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataset.records import (
    ENDINGS, TEXT_COLUMN, DataError, find_files, kind_of, read_documents
)
from dataset.report import report

FORMAT = 2  # part of every cache's name: raise it when the files' meaning changes
BATCH_BYTES = 2 * 2**20  # text encoded in one call: enough to keep all cores busy, little to hold
DEFAULT_CACHE_DIR = "dataset/cache"
FILES = ("tokens.bin", "offsets.bin", "bytes.bin", "hashes.bin")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """(BOS, EOS, padding) of any tokenizer; EOS stands in for what it lacks.

    Raises: DataError if it has no EOS: documents could not be told to end."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("--tokenizer_path: the tokenizer has no EOS token. Set eos_token in it.")
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    return (eos if bos is None else bos), eos, (eos if pad is None else pad)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(files: list[Path], text_column: str = TEXT_COLUMN) -> str:
    """SHA-256 of the files' bytes in order, and of how they are read; dates do not count, nor do
    names but for their endings."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(digest_of_file(path)))
        kind, _ = kind_of(path)
        if kind != "jsonl" or text_column != TEXT_COLUMN:
            digest.update(f"{kind} {text_column if kind != 'txt' else ''}".encode())
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides how a text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules}{special_ids(tokenizer)}".encode()).hexdigest()


@dataclass(frozen=True)
class TokenCache:
    """An opened cache. Arrays are memory-mapped: a page is read when it is used."""

    folder: Path
    meta: dict
    tokens: Tensor  # (num_tokens,) int16 or int32, to be read by ``unsigned``
    offsets: Tensor  # (num_documents + 1,) int64
    num_bytes: Tensor  # (num_documents,) int64
    hashes: Tensor  # (num_documents,) int32

    @classmethod
    def open(cls, folder: str | Path) -> "TokenCache":
        """Map the files of a finished cache. Raises: DataError if one was damaged since."""
        folder = Path(folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        num = meta["num_documents"]
        id_type = torch.int16 if meta["bytes_per_id"] == 2 else torch.int32

        def mapped(name: str, size: int, dtype: torch.dtype) -> Tensor:
            found, expected = (folder / name).stat().st_size, size * dtype.itemsize
            if found != expected:
                raise DataError(
                    f"{folder / name} has {found:,} bytes, not {expected:,}. "
                    f"Delete {folder}; it is made again."
                )
            return torch.from_file(str(folder / name), shared=False, size=size, dtype=dtype)

        return cls(
            folder=folder, meta=meta, tokens=mapped("tokens.bin", meta["num_tokens"], id_type),
            offsets=mapped("offsets.bin", num + 1, torch.int64),
            num_bytes=mapped("bytes.bin", num, torch.int64),
            hashes=mapped("hashes.bin", num, torch.int32)
        )

    def ids(self, document: int) -> Tensor:
        """(length,) int64, a document's token ids."""
        return unsigned(self.tokens[self.offsets[document] : self.offsets[document + 1]])

    def __reduce__(self) -> tuple:
        """Loader processes map the files themselves, however they are started."""
        return TokenCache.open, (self.folder,)


def unsigned(ids: Tensor) -> Tensor:
    """Token ids as stored -> int64."""
    return ids.to(torch.int64) & (2 ** (8 * ids.itemsize) - 1)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, no special token added; control tokens written in a text become themselves.

    The tokenizers library spreads the texts over all cores and frees Python meanwhile."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


@dataclass
class BadRecords:
    """Called with each bad record of a corpus: the first one raises, or they are counted."""

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
    """What a bad record leads to, whether it is met now or was met when the cache was made."""
    raise DataError(f"{message} Correct it, or leave such lines out: --bad_records skip.")


def text_batches(
    files: list[Path], text_column: str, bad: BadRecords, bar: tqdm
) -> Iterator[list[str]]:
    """All documents of all files in order, in lists of about BATCH_BYTES; ``bar`` counts bytes."""
    texts: list[str] = []
    for path in files:
        done = reported = 0
        for text, done in read_documents(path, bad, text_column):
            texts.append(text)
            if done - reported >= BATCH_BYTES:
                bar.update(done - reported)
                reported = done
                yield texts
                texts = []
        bar.update(done - reported)
    yield texts


def encoded_batches(
    tokenizer: PreTrainedTokenizerBase, batches: Iterable[list[str]]
) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Each batch with its ids, in order; the next is encoded while the caller writes this one."""
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
    finally:  # after an error or a signal, only the batch that is being encoded is waited for
        pool.shutdown(cancel_futures=True)


def write_cache(
    folder: Path, files: list[Path], text_column: str, tokenizer: PreTrainedTokenizerBase,
    bad: BadRecords
) -> dict:
    """Tokenize ``files`` into ``folder``; returns counts. Holds a few batches, not the corpus."""
    largest_id = max(tokenizer.get_vocab().values())
    id_code, bytes_per_id = ("H", 2) if largest_id < 2**16 else ("I", 4)
    control_ids = set(tokenizer.all_special_ids)
    num_documents = num_tokens = num_bytes = num_empty = num_control_tokens = 0
    with contextlib.ExitStack() as open_files:
        outputs = [open_files.enter_context((folder / name).open("wb")) for name in FILES]
        tokens, offsets, sizes, hashes = outputs
        size = sum(path.stat().st_size for path in files)
        bar = open_files.enter_context(  # None: quiet where output is not a terminal
            tqdm(total=size, desc="tokenizing", unit="B", unit_scale=1, leave=False, disable=None)
        )
        offsets.write(array("q", [0]).tobytes())
        batches = encoded_batches(tokenizer, text_batches(files, text_column, bad, bar))
        open_files.enter_context(contextlib.closing(batches))  # ends its thread, whatever happens
        for texts, encoded in batches:
            for text, ids in zip(texts, encoded, strict=True):
                if not text.strip() or not ids:
                    num_empty += 1
                    continue
                data = text.encode("utf-8")
                num_documents += 1
                num_tokens += len(ids)
                num_bytes += len(data)
                num_control_tokens += sum(map(control_ids.__contains__, ids))
                tokens.write(array(id_code, ids).tobytes())
                offsets.write(array("q", [num_tokens]).tobytes())
                sizes.write(array("q", [len(data)]).tobytes())
                hashes.write(hashlib.blake2b(data, digest_size=4).digest())
        for file in outputs:
            file.flush()
            os.fsync(file.fileno())
    return {
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_empty": num_empty,
        "num_control_tokens": num_control_tokens,
        "bytes_per_id": bytes_per_id,
        "num_bad": bad.num,
        "bad_examples": bad.examples,
    }


def own_folder(cache_dir: Path, kind: Literal["building", "damaged"]) -> Path:
    """The name under which this process keeps what is no cache yet, or no longer."""
    return cache_dir / f".{kind}-{socket.gethostname()}-{os.getpid()}"


def remove_unfinished(cache_dir: Path) -> None:
    """Delete what killed processes of this machine left behind; those alive keep theirs."""
    stems = [f".{kind}-{socket.gethostname()}" for kind in ("building", "damaged")]
    for folder in cache_dir.glob(".*"):
        stem, _, pid = folder.name.rpartition("-")
        if stem not in stems or not pid.isdigit():
            continue  # also those of a machine whose name begins like ours
        try:
            os.kill(int(pid), 0)
            alive = int(pid) != os.getpid()
        except OSError:
            alive = False
        if not alive:
            shutil.rmtree(folder, ignore_errors=True)


def write_meta(folder: Path, meta: dict) -> None:
    """Finish a cache: digests of its files and, over these and all counts, one of meta itself."""
    digests = {name: digest_of_file(folder / name) for name in FILES}
    meta = meta | {"sha256": digests}
    digests["meta.json"] = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def damaged_file(folder: Path) -> str | None:
    """The first file of a cache that is not as it was written; None if all are."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        own_digest = meta["sha256"].pop("meta.json")
        if own_digest != hashlib.sha256(json.dumps(meta).encode()).hexdigest():
            return "meta.json"
        digests = meta["sha256"].items()
        return next((n for n, digest in digests if digest_of_file(folder / n) != digest), None)
    except FileNotFoundError as error:
        return Path(error.filename).name
    except (ValueError, LookupError, TypeError, AttributeError):  # not JSON, or of another form
        return "meta.json"


def is_finished(folder: Path) -> bool:
    """Whether a whole cache is there. A damaged one is removed, and a warning says so."""
    if not folder.exists():
        return False
    if (name := damaged_file(folder)) is None:
        return True
    warning = f"warning: token cache {folder} is damaged ({name}); making it again"
    print(warning, file=sys.stderr)
    aside = own_folder(folder.parent, "damaged")  # nobody may open it while half of it is deleted
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
    return False


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns: another one tells of another content."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def build_token_cache(
    data_path: str | list[str], tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path = DEFAULT_CACHE_DIR, bad_records: Literal["stop", "skip"] = "stop",
    text_column: str = TEXT_COLUMN
) -> TokenCache:
    """The cache of these files under this tokenizer, made if there is none yet.

    Records that are no document raise (stop) or are left out and counted in ``meta`` (skip).

    Raises: DataError if a file is missing, unusable or changes meanwhile, if there is a bad record
        that is not to be skipped, even if an earlier run skipped it, or if there is no document."""
    files = find_files(data_path)
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()  # a tokenizer's file may ask for either, and documents are whole
        backend.no_padding()
    before = [stamp(path) for path in files]
    data = digest_of_files(files, text_column)
    digests = {"data": data, "tokenizer": digest_of_tokenizer(tokenizer)}
    key = hashlib.sha256(f"{FORMAT}{digests}".encode()).hexdigest()[:24]
    folder = Path(cache_dir) / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder.parent)
    if not is_finished(folder):
        building = own_folder(folder.parent, "building")
        try:
            building.mkdir()
            bad = BadRecords(skip=bad_records == "skip")
            counts = write_cache(building, files, text_column, tokenizer, bad)
            for path, old in zip(files, before, strict=True):
                if stamp(path) != old:  # then the digest is not that of the text which was read
                    raise DataError(f"{path} changed while it was being read. Start again.")
            if counts["num_documents"] == 0:
                raise DataError(f"--data_path {files[0]}: no document with text in it.")
            write_meta(building, {"format": FORMAT, "digests": digests} | counts)
            try:
                building.rename(folder)  # the commit: a cache is whole or absent
            except OSError:
                if not folder.exists():  # otherwise another run was faster, with the same content
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    cache = TokenCache.open(folder)
    if cache.meta["num_bad"] and bad_records != "skip":
        refuse(cache.meta["bad_examples"][0])
    return cache


def main(argv: list[str] | None = None) -> int:
    """Make the cache that training with the same flags finds. Returns: the exit status."""
    parser = argparse.ArgumentParser(description="Tokenize a corpus ahead of its training.")
    parser.add_argument("--data_path", nargs="+", required=True,
                        help=f"files, folders, patterns: {', '.join(ENDINGS)}")
    parser.add_argument("--text_column", default=TEXT_COLUMN, help="of JSONL and parquet")
    parser.add_argument("--tokenizer_path", default="model", help="any transformers tokenizer")
    parser.add_argument("--cache_dir", default=DEFAULT_CACHE_DIR, help="where the cache is kept")
    parser.add_argument("--bad_records", choices=["stop", "skip"], default="stop")
    parser.add_argument("--report", action="store_true", help="tell what the corpus is made of")
    args = parser.parse_args(argv)
    since = time.monotonic()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_path)
        cache = build_token_cache(
            args.data_path, tokenizer, args.cache_dir, args.bad_records, args.text_column
        )
    except (DataError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3
    counts, seconds = cache.meta, time.monotonic() - since
    print(
        f"{cache.folder}: {counts['num_documents']:,} documents, {counts['num_tokens']:,} tokens, "
        f"{counts['num_bytes']:,} bytes of text, in {seconds:.1f} s"
    )
    if args.report:
        print(report(cache, tokenizer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
