"""One way to open files that somebody else may have written, or damaged.

Only regular files are opened: a pipe would wait for ever, a device never end. Nothing is held
before its size is known to be sane.
"""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_JSON_BYTES = 2**24  # far more than any description that is written here


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises: OSError, also if it is a folder, a pipe or a device."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def short(digest: "hashlib._Hash") -> str:
    """The 32 hexadecimal digits by which a state's name tells its content."""
    return digest.hexdigest()[:32]


def hash_of(file: BinaryIO) -> str:
    """32 hexadecimal digits of SHA-256 of an open file's bytes, without holding them."""
    file.seek(0)
    # pyrefly: ignore[bad-argument-type]  # it takes any binary file
    return short(hashlib.file_digest(file, "sha256"))


def digest_of_file(path: str | Path) -> str:
    """As ``hash_of``, of a file's name. Raises: OSError."""
    with open_regular(path) as file:
        return hash_of(file)


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises: OSError; ValueError if it holds anything else."""
    with open_regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES:,} bytes")
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object")
    return content
