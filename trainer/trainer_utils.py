"""The trainer under MiniMind's function names, for code outside this repository; nothing in it
imports this file."""

from pathlib import Path

import torch

from dataset.lm_dataset import SkipBatchSampler
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.checkpoint import KEPT_STATES, checkpoint_name, newest_for_all, save_for_all
from trainer.console import log as Logger  # MiniMind's name
from trainer.device import setup_seed
from trainer.distributed import init_distributed_mode, is_main_process
from trainer.schedule import get_lr
from trainer.weights import get_model_params, init_model, load_tokenizer

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


def lm_checkpoint(
    lm_config: MiniMindConfig,
    weight: str = "pretrain",
    model: MiniMindForCausalLM | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    epoch: int = 0,
    step: int = 0,
    wandb: object | None = None,
    save_dir: str | Path = "checkpoints",
    *,
    update: int | None = None,
    keep: int = KEPT_STATES,
    **state: object,
) -> dict | Path | None:
    """With a model, save all that the next update needs; without, read the newest good state.

    Call it on every rank, between updates. Rank 0 reads and writes, so that all ranks agree.

    Args:
        epoch, step: the current epoch, and the number of updates so far.
        wandb: the tracker; its ``id`` is saved, so that a resumed run continues it.
        update: read the state saved after this update instead of the newest.
        keep: how many states to keep.
        state: additional values to save: tensors, and what JSON can hold, in dicts and lists;
            tuples come back as lists. For an object with a ``state_dict``, the latter.
    Returns: the state read (None if there is none), or the path of the state written.
    Raises: OSError if saving fails, with earlier states intact; CheckpointError if there are states
    but none is good."""
    name = checkpoint_name(weight, lm_config)
    if model is None:
        return newest_for_all(save_dir, name, update)
    parts = {"model": model, "optimizer": optimizer, **state, "epoch": epoch, "step": step}
    parts["wandb_id"] = getattr(wandb, "id", None)
    return save_for_all(save_dir, name, step, parts, keep)
