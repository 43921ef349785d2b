"""Text files, tokenized once: ids on disk, memory-mapped afterwards.

A cache is a folder named after the content of the data and of the tokenizer:

    tokens.bin     every document's ids, one after another; two bytes each while the vocabulary fits
    offsets.bin    int64, where each document begins in tokens.bin, and the end of the last
    bytes.bin      int64, the length of each document's text in UTF-8 bytes
    hashes.bin     int32, a hash of each document's text: it decides which are held out
    meta.json      counts and digests

Main memory stays flat while it is built and while it is read, however large the corpus.
"""

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import socket
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

FORMAT = 1  # part of every cache's name: raise it when the files' meaning changes
BATCH_BYTES = 2 * 2**20  # text encoded in one call: enough to keep all cores busy, little to hold
WAY_TO_DATA = (
    "Download MiniMind's corpus from https://huggingface.co/datasets/jingyaogong/minimind_dataset "
    "into dataset/, or try --preset demo."
)
DEFAULT_CACHE_DIR = "dataset/cache"


class DataError(ValueError):
    """The data cannot be trained on as it is; the message names file and line."""

    exit_status = 3


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


def read_text(line: bytes, where: str) -> str:
    """One line of JSONL -> its document. Raises: DataError with ``where`` and what was found."""
    expected = 'Each line must be one JSON object with a string "text": {"text": "..."}.'
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
        raise DataError(f"{where}: {found}. Convert the file to UTF-8.") from None
    except json.JSONDecodeError as error:
        found = f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        raise DataError(f"{where}: {found}. {expected}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise DataError(f"{where}: not readable as JSON: {error}. {expected}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: found a JSON {type(record).__name__}. {expected}")
    if not isinstance(text := record.get("text"), str):
        keys = ", ".join(map(repr, record)) or "none"
        found = (
            f'"text" is {text!r:.40}' if "text" in record else f'no "text"; its keys: {keys:.80}'
        )
        raise DataError(f"{where}: {found}. {expected}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: half of a surrogate pair (\\ud800-\\udfff) in the text."
        ) from None
    return text


def read_documents(path: Path) -> Iterator[tuple[str, int]]:
    """Each document of a JSONL file, with the bytes read so far. Blank lines are passed over.

    Raises: DataError with file and line at the first line that is no document."""
    num_bytes = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            num_bytes += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield read_text(line, f"{path} line {number}"), num_bytes


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """(BOS, EOS, padding) of any tokenizer; EOS stands in for what it lacks.

    Raises: DataError if it has no EOS: documents could not be told to end."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("--tokenizer_path: the tokenizer has no EOS token. Set eos_token in it.")
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    return (eos if bos is None else bos), eos, (eos if pad is None else pad)


def digest_of_files(files: list[Path]) -> str:
    """SHA-256 of the files' sizes and bytes, in order; names and dates do not count."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256")
        digest.update(part.digest())
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
    tokens: Tensor  # (num_tokens,) int16 or int32, to be read as unsigned: see ``ids``
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

    def __reduce__(self) -> tuple:
        """Loader processes map the files themselves, however they are started."""
        return TokenCache.open, (self.folder,)

    def ids(self, positions: Tensor) -> Tensor:
        """Token ids, int64, at the given positions of the cache."""
        return self.tokens[positions].to(torch.int64) & (2 ** (8 * self.tokens.itemsize) - 1)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, no special token added; control tokens written in a text become themselves.

    The tokenizers library spreads the texts over all cores and frees Python meanwhile."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def text_batches(files: list[Path], bar: tqdm) -> Iterator[list[str]]:
    """All documents of all files in order, in lists of about BATCH_BYTES; ``bar`` counts bytes."""
    texts: list[str] = []
    for path in files:
        done = reported = 0
        for text, done in read_documents(path):
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
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead: deque = deque()
        for texts in batches:
            ahead.append((texts, pool.submit(encode, tokenizer, texts)))
            if len(ahead) == 2:
                texts, future = ahead.popleft()
                yield texts, future.result()
        for texts, future in ahead:
            yield texts, future.result()


def write_cache(folder: Path, files: list[Path], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Tokenize ``files`` into ``folder``; returns counts. Holds a few batches, not the corpus."""
    largest_id = max(tokenizer.get_vocab().values())
    id_code, bytes_per_id = ("H", 2) if largest_id < 2**16 else ("I", 4)
    control_ids = set(tokenizer.all_special_ids)
    num_documents = num_tokens = num_bytes = num_empty = num_control_tokens = 0
    with contextlib.ExitStack() as open_files:
        names = ("tokens.bin", "offsets.bin", "bytes.bin", "hashes.bin")
        outputs = [open_files.enter_context((folder / name).open("wb")) for name in names]
        tokens, offsets, sizes, hashes = outputs
        size = sum(path.stat().st_size for path in files)
        bar = open_files.enter_context(  # None: quiet where output is not a terminal
            tqdm(total=size, desc="tokenizing", unit="B", unit_scale=1, leave=False, disable=None)
        )
        offsets.write(array("q", [0]).tobytes())
        for texts, encoded in encoded_batches(tokenizer, text_batches(files, bar)):
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
    }


def remove_unfinished(cache_dir: Path) -> None:
    """Delete what killed builds on this machine left behind; those alive keep theirs."""
    prefix = f".building-{socket.gethostname()}-"
    for folder in cache_dir.glob(f"{prefix}*"):
        if not folder.name.removeprefix(prefix).isdigit():
            continue  # of a machine whose name begins like ours
        pid = int(folder.name.removeprefix(prefix))
        try:
            os.kill(pid, 0)
            alive = pid != os.getpid()
        except OSError:
            alive = False
        if not alive:
            shutil.rmtree(folder, ignore_errors=True)


def build_token_cache(
    data_path: str | list[str], tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path = DEFAULT_CACHE_DIR
) -> TokenCache:
    """The cache of these files under this tokenizer, made if there is none yet.

    Raises: DataError if a file is missing, a line is no document, or there is no document."""
    files = find_files(data_path)
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()  # a tokenizer's file may ask for either, and documents are whole
        backend.no_padding()
    digests = {"data": digest_of_files(files), "tokenizer": digest_of_tokenizer(tokenizer)}
    key = hashlib.sha256(f"{FORMAT}{digests}".encode()).hexdigest()[:24]
    folder = Path(cache_dir) / key
    if not (folder / "meta.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder.parent)
        building = folder.parent / f".building-{socket.gethostname()}-{os.getpid()}"
        building.mkdir()
        try:
            meta = {"format": FORMAT, "digests": digests} | write_cache(building, files, tokenizer)
            if meta["num_documents"] == 0:
                raise DataError(f"--data_path {files[0]}: no document with text in it.")
            (building / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            try:
                building.rename(folder)  # the commit: a cache is whole or absent
            except OSError:
                if not folder.exists():  # otherwise another run was faster, with the same content
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return TokenCache.open(folder)
