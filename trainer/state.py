"""A state as bytes, and what it must look like before anything is restored from it.

Tensors are laid out as in every safetensors file; all other values are JSON, in a tensor of bytes.
Opening a state therefore runs no code and allocates no more than the file holds.
"""

import json
from collections.abc import Iterable
from types import UnionType
from typing import Any, BinaryIO, Protocol

import safetensors.torch
import torch
from torch import Tensor

from trainer.errors import CheckpointError

DTYPES = {  # by the names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
JSON = "json"  # the tensor that holds what is no tensor: a header could not exceed 100 MB
MAX_HEADER_BYTES = 10**8  # as the format allows
REFERENCE = "$tensor"  # {"$tensor": name} stands in the JSON where the tensor belongs


class Writable(Protocol):
    """A file, as far as writing needs it."""

    def write(self, data: bytes | memoryview) -> int: ...


def write_state(content: dict, file: Writable) -> None:
    """Write nested dicts and lists of tensors and plain values, one tensor at a time.

    Tuples are read back as lists, and names of decimal digits as integers, which is how optimizers
    number their parameters.

    Raises: TypeError, ValueError for what could not be read back."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(without_tensors(content, "", tensors), ensure_ascii=False)
    tensors[JSON] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    header, end = {}, 0
    by_alignment = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in by_alignment:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for name in by_alignment:
        if tensors[name].numel():
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def num_bytes(content: dict) -> int:
    """The bytes that ``write_state`` writes, except for the header's few."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(without_tensors(content, "", tensors), ensure_ascii=False)
    return len(text.encode()) + sum(tensor.nbytes for tensor in tensors.values())


def without_tensors(part: object, name: str, tensors: dict[str, Tensor]) -> object:
    """The part with references in place of its tensors, which go to ``tensors``.

    Raises: ValueError for what could not be read back."""
    if isinstance(part, Tensor):
        if name in tensors or part.dtype not in DTYPES:
            raise ValueError(f"{name} cannot be saved: another part's name, or {part.dtype}")
        tensors[name] = part
        return {REFERENCE: name}
    if isinstance(part, dict):
        named = {str(key): value for key, value in part.items()}
        check_names(named)
        if len(named) < len(part) or REFERENCE in named:
            raise ValueError(f"{name} cannot be saved: two names alike, or one is {REFERENCE}")
        return {
            key: without_tensors(value, f"{name}/{key}", tensors) for key, value in named.items()
        }
    if isinstance(part, list | tuple):
        return [without_tensors(value, f"{name}/{i}", tensors) for i, value in enumerate(part)]
    check_plain(part)
    return part


def size_by_header(file: BinaryIO) -> int:
    """How many bytes a state has, by its own first ones; -1 if those are none of a state."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        return -1
    try:
        entries = json.loads(file.read(length))
        ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return -1


def parse_state(data: bytes) -> dict:
    """What ``write_state`` wrote, on the CPU. Raises: ValueError if it is anything else."""
    try:
        tensors = safetensors.torch.load(data)
        content = with_tensors(json.loads(tensors.pop(JSON).numpy().tobytes()), tensors)
    except ValueError:
        raise
    except Exception as error:  # somebody else's file can raise anything in there
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None
    if tensors or not isinstance(content, dict):
        raise ValueError("its tensors and its JSON do not belong together")
    return content


def with_tensors(part: object, tensors: dict[str, Tensor]) -> object:
    """The part with its tensors in place, each taken from ``tensors`` and used only there."""
    if isinstance(part, dict):
        if REFERENCE in part:
            name = part[REFERENCE]
            if len(part) > 1 or not isinstance(name, str) or name not in tensors:
                raise ValueError(f"a reference to {name!s:.40} has no tensor of its own")
            return tensors.pop(name)
        check_names(part)
        return {
            int(key) if key.isdecimal() else key: with_tensors(value, tensors)
            for key, value in part.items()
        }
    if isinstance(part, list):
        return [with_tensors(value, tensors) for value in part]
    check_plain(part)
    return part


def check_names(part: Iterable[object]) -> None:
    """Raises: ValueError unless a message can show each name."""
    if not all(isinstance(key, str) and key.isprintable() and len(key) <= 200 for key in part):
        raise ValueError("one of its names is not one line of text")


def check_plain(part: object) -> None:
    """Raises: ValueError, OverflowError for text and numbers that nothing else could use."""
    if isinstance(part, str):
        part.encode()  # half of a surrogate pair could not be written anywhere
    if isinstance(part, int):
        part.to_bytes(8, signed=True)  # larger integers overflow where they are used


def check_fits(found: Any, expected: Any, where: str) -> None:
    """Check that a part of a state has the names, shapes and types of this run's own part.

    It is called before anything is copied: a moment of another shape could make a fused kernel
    write past its memory.

    Args:
        expected: an example; or a type; or a dict or list with one example of all that is in it,
            such as ``{str: float}`` and ``[int]``.
    Raises: CheckpointError naming the first difference."""
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        given, own = (f"{tuple(t.shape)} {t.dtype}" for t in (found, expected))
        refuse_unless(given == own, f"{where} is {given}, expected {own}")
        refuse_unless(torch.isfinite(found).all(), f"{where} is not finite")
        return
    kind = expected if isinstance(expected, type | UnionType) else type(expected)
    kind = Tensor if isinstance(expected, Tensor) else kind
    fits = isinstance(found, kind) and (kind is expected or not isinstance(found, bool))
    name = getattr(kind, "__name__", kind)
    refuse_unless(fits, f"{where} is a {type(found).__name__}, expected {name}")
    if isinstance(expected, list):
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
        refuse_unless(
            not missing and not unexpected,
            f"{where} lacks {', '.join(missing) or 'nothing'}, and has "
            f"{', '.join(unexpected) or 'nothing'} that this model has not",
        )
        for key in expected:
            check_fits(found[key], expected[key], f"{where}.{key}")


def refuse_unless(fits: object, otherwise: str) -> None:
    """Raises: CheckpointError that says what was found, unless it fits."""
    if not fits:
        raise CheckpointError(f"the state does not fit: {otherwise}.")
