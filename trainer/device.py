"""Which device, and which precision, this machine trains with."""

import torch


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
