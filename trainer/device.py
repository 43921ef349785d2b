"""What this machine trains with: device, precision, generators, memory, compiled code."""

import contextlib
import ctypes
import os
import random
from pathlib import Path

import torch

from trainer.distributed import init_distributed_mode, world_size


def join_ranks(name: str, timeout_seconds: float) -> torch.device:
    """Join the ranks that torchrun started, if it did. Returns: this rank's device, for the name
    of one. Raises: RankError if not all of them come."""
    local_rank = init_distributed_mode(name, timeout_seconds)
    device = torch.device(name)
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", local_rank)
    return device


def default_device() -> str:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_problems(name: str) -> list[str]:
    """What keeps this machine from training on ``--device``, in words; empty if nothing does."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"--device is {name!r}, expected cuda, mps or cpu"]
    if device.type == "cuda" and not torch.cuda.is_available():
        return ["--device is cuda, but PyTorch finds no CUDA device here; --device cpu works"]
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return [f"--device is {name}, but there are {torch.cuda.device_count()} CUDA devices"]
    if device.type == "mps" and not torch.backends.mps.is_available():
        return ["--device is mps, but PyTorch finds no Metal device here; --device cpu works"]
    return []


def default_dtype(device: str) -> str:
    """bfloat16 where the device computes in it: else float16 on a card, and float32 on a CPU, which
    would have to emulate either, up to 20 times slower, and on MPS."""
    if device.startswith("cuda"):
        return "bfloat16" if card_has_bfloat16(device) else "float16"
    if device.startswith("mps"):
        return "bfloat16" if computes_in(device, torch.bfloat16) else "float32"
    found = getattr(torch.cpu, "get_capabilities", dict)()  # where torch cannot say: none
    return "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def card_has_bfloat16(device: str | torch.device) -> bool:
    """Without emulation: NVIDIA's from 2020 on."""
    if not torch.cuda.is_available():
        return True  # no CUDA at all: device_problems() reports that
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def computes_in(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of matrices comes out right; older systems of Apple's have no bfloat16."""
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        return bool((ones @ ones == 8).all())
    except (RuntimeError, TypeError, AssertionError):
        return False


def setup_seed(seed: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(seed)
    torch.manual_seed(seed)  # all devices


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, on the CPU.

    By default it returns large blocks at once, and every step asks for the same pages again."""
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another system's C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


def keep_compiled_code(folder: str | Path) -> None:
    """Let the next run find what torch.compile makes, unless the environment names a place.

    By default it lies in /tmp, which a rented machine loses when it is started again; torch writes
    that default into the environment as soon as it is imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # torch's own business

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "compiled").resolve())
