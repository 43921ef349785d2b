"""Opening a file that somebody else may have made: no code from it, no surprise in it.

``load_tensors`` reads what torch.save wrote, and nothing else; ``check_fits`` compares it with what
it is to replace, by names, shapes and types, before anything is copied.
"""

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import UnionType
from typing import BinaryIO

import torch
from torch import Tensor

from trainer.errors import CheckpointError, shown

# What tensors in dicts and lists need. torch would let a file call more: byte arrays and tensors of
# any size, sparse ones whose indices point anywhere, text encoders.
NEEDED = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|"
    r"torch (Float|Half|BFloat16|Double|Byte|Char|Short|Int|Long|Bool)Storage"
)
# How torch.save ends its zip files, of whatever size: the directory's length and place, twice.
ZIP_END = struct.Struct("<4s36x2Q 4s4xQ4x 4s16xH")


def load_tensors(source: io.BytesIO | Path, path: Path) -> dict:
    """What torch.save wrote, on the CPU, without running code. Raises: CheckpointError."""
    try:
        with source.open("rb") if isinstance(source, Path) else source as file:
            num_steps = check_archive(file)
            with warnings.catch_warnings(record=True, action="always") as warned:
                content = torch.load(file, map_location="cpu", weights_only=True)
        if warned:  # of nothing that torch.save writes
            raise ValueError(warned[0].message)
        check_plain(content, num_steps)
        return content
    except (zipfile.BadZipFile, struct.error):
        reason = "it is not what torch.save writes, or cut short"
    except pickle.UnpicklingError:  # torch's own words advise to run the code
        reason = "damaged"
    except Exception as error:  # a hostile file can raise anything in there
        reason = (str(error).splitlines() or ["damaged"])[0]
    raise CheckpointError(f"{path} cannot be loaded: {shown(reason):.160}.")


def check_archive(file: BinaryIO) -> int:
    """A zip file as torch.save writes it, whose content asks for nothing but tensors.

    With one directory, at its end, by which every reader finds the same entries; and nothing packed
    in them: a few bytes could unpack to any size.

    Returns: the number of steps that build the content. Raises: ValueError, BadZipFile."""
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
    num_steps = 0
    for opcode, argument, _ in steps:
        if opcode.name == "GLOBAL" and not NEEDED.fullmatch(argument):
            wanted = argument.replace(" ", ".")
            raise ValueError(f"it asks to import {wanted}, and tensors need no code")
        num_steps += 1
    file.seek(0)
    return num_steps


def check_plain(content: object, most: int) -> None:
    """Only dicts, lists, text, numbers, and tensors that are as large as they say.

    Args: most: so many parts at most: a list may hold itself, or another one twice, and so on.
    Raises: ValueError."""
    waiting, num = [content], 0
    while waiting:
        part, num = waiting.pop(), num + 1
        if num + len(waiting) > most:
            raise ValueError("its parts hold each other")
        if isinstance(part, dict):
            if isinstance(part, OrderedDict):
                vars(part).clear()  # an attribute from a file would hide a method
            waiting += dict.values(part)
            if not all(isinstance(k, int) or is_name(k) for k in dict.keys(part)):
                raise ValueError("one of its names is no line of text")
        elif isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, Tensor):
            if part.numel() * part.element_size() > part.untyped_storage().nbytes():
                raise ValueError(f"it holds a tensor {tuple(part.shape)} without its numbers")
        elif isinstance(part, str):
            part.encode()  # half of a surrogate pair could not be written anywhere
        elif isinstance(part, int):
            part.to_bytes(8, signed=True)
        elif not isinstance(part, float | None):
            raise ValueError(f"it holds a {type(part).__name__}")


def is_name(key: object) -> bool:
    """Whether a message can name it."""
    return isinstance(key, str) and key.isprintable() and len(key) <= 200


def check_fits(found: object, expected: object, where: str) -> None:
    """A part of a state has the names, shapes and types of this run's own part.

    Nothing is copied before: a crafted shape could make a fused kernel write past its memory, and
    so could a tensor that says one number many times over.

    Args: expected: an example; or a type; or a dict or list with the example of all that is in it,
    ``{str: float}``, ``[int]``.
    Raises: CheckpointError naming the first difference."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or not is_plain(found):
            raise CheckpointError(f"the state does not fit: {where} is no plain tensor.")
        given, own = (f"{tuple(t.shape)} {t.dtype}" for t in (found, expected))
        if given != own:
            raise CheckpointError(f"the state does not fit: {where} is {given}, expected {own}.")
        if not torch.isfinite(found).all():
            raise CheckpointError(f"the state does not fit: {where} is not finite.")
    elif isinstance(expected, type | UnionType):
        if not isinstance(found, expected):
            own = getattr(expected, "__name__", expected)
            given = type(found).__name__
            raise CheckpointError(f"the state does not fit: {where} is a {given}, expected {own}.")
    elif not isinstance(found, type(expected)) or isinstance(found, bool):
        given, own = type(found).__name__, type(expected).__name__
        raise CheckpointError(f"the state does not fit: {where} is a {given}, expected {own}.")
    elif isinstance(expected, list):
        for number, part in enumerate(found):
            check_fits(part, expected[0], f"{where}[{number}]")
    elif isinstance(expected, dict) and isinstance(next(iter(expected), None), type):
        [(key_type, example)] = expected.items()
        for key, part in found.items():
            check_fits(key, key_type, f"a name in {where}")
            check_fits(part, example, f"{where}.{key}")
    elif isinstance(expected, dict):
        missing = [str(key) for key in expected if key not in found][:5]
        unexpected = [str(key) for key in found if key not in expected][:5]
        if missing or unexpected:
            raise CheckpointError(
                f"the state does not fit: {where} lacks {', '.join(missing) or 'nothing'}, and has "
                f"{', '.join(unexpected) or 'nothing'} that this model has not."
            )
        for key in expected:
            check_fits(found[key], expected[key], f"{where}.{key}")


def is_plain(tensor: Tensor) -> bool:
    """Whether each number is in memory once, and in order."""
    special = tensor.is_quantized or tensor.is_meta or tensor.requires_grad
    return tensor.layout == torch.strided and tensor.is_contiguous() and not special
