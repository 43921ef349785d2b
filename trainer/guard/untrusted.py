"""Opening weights that somebody else may have made: no code from the file, no surprise in it."""

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

# What tensors in dicts and lists need. torch would let a file call more: byte arrays and tensors of
# any size, sparse ones whose indices point anywhere, text encoders.
NEEDED = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|"
    r"torch (Float|Half|BFloat16|Double|Byte|Char|Short|Int|Long|Bool)Storage"
)
# How torch.save ends its zip files, of whatever size: the directory's length and place, twice.
ZIP_END = struct.Struct("<4s36x2Q 4s4xQ4x 4s16xH")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, of a file by torch.save. Raises: CheckpointError."""
    try:
        with path.open("rb") as file:
            check_archive(file)
            with warnings.catch_warnings(record=True, action="always") as warned:
                content = torch.load(file, map_location="cpu", weights_only=True)
        if warned:  # torch.save writes nothing that torch.load warns of
            raise ValueError(warned[0].message)
        return plain_tensors(content)
    except (zipfile.BadZipFile, struct.error):
        reason = "it is not what torch.save writes, or cut short"
    except pickle.UnpicklingError:  # torch's own words suggest_micro_batch to run the code
        reason = "damaged"
    except Exception as error:  # a hostile file can raise anything in there
        reason = (str(error).splitlines() or ["damaged"])[0]
    raise CheckpointError(f"{path} cannot be loaded: {printable(reason):.160}.")


def check_archive(file: BinaryIO) -> None:
    """A zip file as torch.save writes it, whose content asks for nothing but tensors.

    With one directory, at its end, by which every reader finds the same entries; and nothing packed
    in them: a few bytes could unpack to any size.

    Raises: ValueError, BadZipFile."""
    start, size = file.read(4), file.seek(0, io.SEEK_END)
    end = file.seek(max(size - ZIP_END.size, 0))
    mark, length, place, second, second_place, third, comment = ZIP_END.unpack(file.read())
    marks = start, mark, second, third, comment
    if marks != (b"PK\3\4", b"PK\6\6", b"PK\6\7", b"PK\5\6", 0) or not (
        place + length == second_place == end
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
            raise ValueError(f"it has {len(pickled)} entries data.pkl")
        steps = pickletools.genops(archive.read(pickled[0]))
    for opcode, argument, _ in steps:
        if opcode.name == "GLOBAL" and not NEEDED.fullmatch(str(argument)):
            wanted = str(argument).replace(" ", ".")
            raise ValueError(f"it asks to import {wanted}, and tensors need no code")
    file.seek(0)


def plain_tensors(content: object) -> dict[str, Tensor]:
    """The content, if it is a dict of tensors of real numbers, each as large as it says.

    Raises: ValueError."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a plain state dict")
    tensors = dict(dict.items(content))  # attributes from the file could hide a method
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
            raise ValueError("one of its names is not one line of text")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is no tensor of real numbers: this is no plain state dict")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} {tuple(tensor.shape)} comes without its numbers")
    return tensors
