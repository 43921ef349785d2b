"""The trainer's parts by the names MiniMind's readers know; nothing inside imports this file."""

from pathlib import Path

import torch

from dataset.lm_dataset import SkipBatchSampler
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.checkpoint import KEPT_STATES, checkpoint_name, newest_for_all, save_for_all
from trainer.console import log as Logger  # noqa: N812: MiniMind's name
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
    """With a model: save all that the next update needs. Without: the newest good state or None.

    Every rank calls it, between updates; rank 0 reads and writes, so that one disk decides.

    Args:
        epoch, step: the epoch being trained, and the updates done in all.
        wandb: the tracker; its ``id`` is kept, so that the same run continues.
        update: load the state saved after this update instead of the newest.
        keep: how many states stay.
        state: more to keep; an object with a ``state_dict`` gives that.
    Returns: the state that was read, or the path of the one that was written.
    Raises: OSError if saving fails, with the earlier states intact; CheckpointError if there are
    states and none is good."""
    name = checkpoint_name(weight, lm_config)
    if model is None:
        return newest_for_all(save_dir, name, update)
    parts = {"model": model, "optimizer": optimizer, **state, "epoch": epoch, "step": step}
    parts["wandb_id"] = getattr(wandb, "id", None)
    return save_for_all(save_dir, name, step, parts, keep)
