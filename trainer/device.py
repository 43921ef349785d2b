"""The machine: device, precision, random number generators, memory, compiled code."""

import os
import random
import re
import warnings
from pathlib import Path

import torch

from trainer.distributed import init_distributed_mode, world_size


def join_ranks(name: str, timeout_seconds: float) -> torch.device:
    """Join the ranks that torchrun started, if any.

    Args: name: of the device, such as ``cuda``; each rank gets its own.
    Raises: as init_distributed_mode."""
    local_rank = init_distributed_mode(name, timeout_seconds)
    device = torch.device(name)
    if device.type == "cuda":
        if world_size() > 1:
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device.index or 0)  # events and generators are its own
    return device


def default_device() -> str:
    """The fastest kind of device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_problems(name: str) -> list[str]:
    """Why this machine cannot train on ``--device``; empty if it can."""
    found = re.fullmatch(r"cpu|mps|cuda(?::(0|[1-9]\d{0,8}))?", name, re.ASCII)
    if found is None:
        return [f"--device is {name!r}, expected cuda, mps or cpu"]
    if name.startswith("cuda") and not torch.cuda.is_available():
        return ["--device is cuda, but PyTorch finds no CUDA device here; --device cpu works"]
    if int(found[1] or 0) >= max(torch.cuda.device_count(), 1):
        return [f"--device is {name}, but there are {torch.cuda.device_count()} CUDA devices"]
    if name == "mps" and not torch.backends.mps.is_available():
        return ["--device is mps, but PyTorch finds no Metal device here; --device cpu works"]
    return []


def default_dtype(device: str) -> str:
    """bfloat16 if the device supports it natively; otherwise float16 on a GPU, and float32 on MPS
    and on a CPU, where emulating a 16-bit type would be up to 20 times slower."""
    if device.startswith("cuda"):
        return "bfloat16" if gpu_has_bfloat16(device) else "float16"
    if device.startswith("mps"):
        return "bfloat16" if supports_dtype(device, torch.bfloat16) else "float32"
    found = getattr(torch.cpu, "get_capabilities", dict)()  # {} if torch cannot tell
    return "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def default_residual_dtype(device: str, dtype: str) -> str:
    """bfloat16 where it is faster and products are rounded to it anyway: an H200 takes 4 % less
    time (docs/BENCHMARKS.md), and three short runs on a CPU lost nothing (docs/LOG.md)."""
    return "bfloat16" if device.startswith("cuda") and dtype == "bfloat16" else "float32"


def gpu_has_bfloat16(device: str | torch.device) -> bool:
    """Whether a GPU supports bfloat16 without emulation, as NVIDIA's do since 2020."""
    if not torch.cuda.is_available():
        return True  # device_problems() reports that CUDA is missing
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def supports_dtype(device: str, dtype: torch.dtype) -> bool:
    """Whether a matrix product in ``dtype`` is correct; older macOS versions lack bfloat16."""
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        return bool((ones @ ones == 8).all())
    except (RuntimeError, TypeError, AssertionError):
        return False


def setup_seed(seed: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(seed)
    torch.manual_seed(seed)  # all devices


def keep_compiled_code(folder: str | Path) -> None:
    """Cache compiled code in ``folder`` for later runs, unless the user chose a place for it.

    The default is below /tmp, which a rented machine loses on a restart; torch sets the environment
    variable to that default when it is imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # private API

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "compiled").resolve())


def silence_compiler() -> None:
    """Ignore the compiler's warnings: of choices of its own, which nobody who trains can mend."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor")
