"""Safe loading of weights files from untrusted sources: no code from the file is run."""

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from trainer.errors import CheckpointError, printable
from trainer.reading import open_regular
from trainer.state import check_names

# The globals that dicts and lists of tensors need. torch would allow more, such as byte arrays and
# tensors of any size, sparse tensors with out-of-bounds indices, and text encoders.
ALLOWED_GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|"
    r"torch (Float|Half|BFloat16|Double|Byte|Char|Short|Int|Long|Bool)Storage"
)
# The end of every zip file by torch.save: length and position of its directory, twice.
ZIP_END = struct.Struct("<4s36x2Q 4s4xQ4x 4s16xH")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file by torch.save, by name, on the CPU. Raises: CheckpointError."""
    try:
        with open_regular(path) as file:
            check_archive(file)
            with warnings.catch_warnings(record=True, action="always") as warned:
                content = torch.load(file, map_location="cpu", weights_only=True)
        if warned:  # torch.save writes nothing that torch.load warns about
            raise ValueError(warned[0].message)
        return plain_tensors(content)
    except (zipfile.BadZipFile, struct.error):
        reason = "it is not what torch.save writes, or was cut short"
    except pickle.UnpicklingError:  # torch's message suggests running the file's code
        reason = "damaged"
    except Exception as error:  # a hostile file can make torch raise anything
        reason = (str(error).splitlines() or ["damaged"])[0]
    raise CheckpointError(f"{path} cannot be loaded: {printable(reason):.160}.")


def check_archive(file: BinaryIO) -> None:
    """Check that a file is a zip archive as torch.save writes it, and contains only tensors.

    It must have one directory, at its end, so that every reader finds the same entries, and no
    compressed entries, since a few bytes could expand to any size.

    Raises: ValueError, BadZipFile."""
    first, size = file.read(4), file.seek(0, io.SEEK_END)
    end = file.seek(max(size - ZIP_END.size, 0))
    mark, length, position, locator, end_position, last, comment = ZIP_END.unpack(file.read())
    marks = first, mark, locator, last, comment
    if marks != (b"PK\3\4", b"PK\6\6", b"PK\6\7", b"PK\5\6", 0) or not (
        position + length == end_position == end
    ):
        raise zipfile.BadZipFile
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("torch.save does not compress")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries overlap")
        pickled = [e for e in entries if e.filename.lower().endswith("data.pkl")]
        if len(pickled) != 1:
            raise ValueError(f"it has {len(pickled)} entries named data.pkl")
        steps = pickletools.genops(archive.read(pickled[0]))
    for opcode, argument, _ in steps:
        if opcode.name == "GLOBAL" and not ALLOWED_GLOBALS.fullmatch(str(argument)):
            wanted = str(argument).replace(" ", ".")
            raise ValueError(f"it asks to import {wanted}, which tensors do not need")
    file.seek(0)


def plain_tensors(content: object) -> dict[str, Tensor]:
    """The content, if it is a dict of floating-point tensors whose storage holds all their numbers.

    Raises: ValueError."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a plain state dict")
    tensors = dict(dict.items(content))  # an attribute from the file could shadow items()
    check_names(tensors)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is not a tensor of real numbers: this is not a plain state dict"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} {tuple(tensor.shape)} is larger than its storage")
    return tensors
