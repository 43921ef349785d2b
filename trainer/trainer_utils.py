"""The trainer's parts by the names MiniMind's readers know."""

import contextlib
import ctypes
import itertools
import os
import random
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import distributed
from trainer.checkpoint import (
    KEPT_STATES, checkpoint_name, newest_state, rng_state, save_state
)
from trainer.distributed import init_distributed_mode, is_main_process
from trainer.errors import SettingsError
from trainer.schedule import get_lr
from trainer.signals import say
from trainer.weights import load_weights, weights_path

__all__ = [
    "Logger",
    "SkipBatchSampler",
    "get_lr",
    "get_model_params",
    "init_distributed_mode",
    "init_model",
    "is_main_process",
    "lm_checkpoint",
    "load_tokenizer",
    "setup_seed",
]


def Logger(content: str) -> None:
    """Print a line, on the main process only, above the progress bar if there is one."""
    if is_main_process():
        say(tqdm.write, content)


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


def get_model_params(model: MiniMindForCausalLM, config: MiniMindConfig) -> tuple[int, int]:
    """Parameters in all, and those that one token passes through (less with experts)."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unused = experts * (1 - config.num_experts_per_tok / config.num_experts)
    return total, total - round(unused)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Any transformers tokenizer; the shipped one, ``model``, wherever the program was started.

    Raises: SettingsError if ``path`` holds none."""
    if path == "model" and not Path(path).is_dir():
        path = str(Path(__file__).resolve().parents[1] / path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise SettingsError(f"--tokenizer_path {path}: no tokenizer there: {reason:.200}") from None


def init_model(
    lm_config: MiniMindConfig, from_weight: str = "none", tokenizer_path: str = "model",
    save_dir: str = "out", device: str | torch.device = "cpu"
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """A new model, or with ``from_weight`` one that starts from ``<save_dir>/<from_weight>_*.pth``.

    Raises: CheckpointError if those weights are missing or of another shape."""
    tokenizer = load_tokenizer(tokenizer_path)
    model = MiniMindForCausalLM(lm_config)
    if from_weight != "none":
        path = weights_path(save_dir, from_weight, lm_config)
        load_weights(model, path, flag=f"--from_weight {from_weight}")
    return model.to(device), tokenizer


class SkipBatchSampler(Sampler[list[int]]):
    """Consecutive batches of ``sampler``, from ``skip_batches`` on, dealt to ranks in turn."""

    def __init__(
        self, sampler: Iterable[int], batch_size: int, skip_batches: int = 0, *, rank: int = 0,
        world_size: int = 1
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.skip_batches = skip_batches
        self.rank, self.world_size = rank, world_size

    def _all_batches(self) -> Iterator[list[int]]:
        items = itertools.islice(self.sampler, self.skip_batches * self.batch_size, None)
        while batch := list(itertools.islice(items, self.batch_size)):
            yield batch

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._all_batches(), self.rank, None, self.world_size)

    def __len__(self) -> int:
        left = max(0, -(-len(self.sampler) // self.batch_size) - self.skip_batches)
        return len(range(self.rank, left, self.world_size))


def lm_checkpoint(
    lm_config: MiniMindConfig, weight: str = "pretrain", model: MiniMindForCausalLM | None = None,
    optimizer: torch.optim.Optimizer | None = None, epoch: int = 0, step: int = 0,
    wandb: object | None = None, save_dir: str | Path = "checkpoints", *, update: int | None = None,
    keep: int = KEPT_STATES, **state: object
) -> dict | Path | None:
    """With a model: save all that the next update needs. Without: the newest good state or None.

    Every rank calls it, between updates; rank 0 reads and writes, so that one disk decides.

    Args:
        epoch, step: the epoch being trained, and the updates done in all.
        wandb: the tracker; its ``id`` is kept, so that the same run goes on.
        update: load the state saved after this update instead of the newest.
        keep: how many states stay.
        state: more to keep; an object with a ``state_dict`` gives that.
    Returns: the state that was read, or the path of the one that was written.
    Raises: OSError if saving fails, with the earlier states intact; CheckpointError if there are
    states and none is good."""
    name = checkpoint_name(weight, lm_config)
    if model is None:
        found, complaints = distributed.first_on_each_machine(
            partial(newest_state, save_dir, name, update), alone=True
        )
        for complaint in complaints:
            Logger(f"warning: {complaint} Using the state before it.")
        return found
    parts = {"model": model, "optimizer": optimizer} | state
    plain = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
    plain |= {"epoch": epoch, "step": step, "wandb_id": getattr(wandb, "id", None)}
    plain["rng"] = distributed.gather(rng_state())
    return distributed.first_on_each_machine(
        partial(save_state, save_dir, name, step, plain, keep), alone=True
    )
