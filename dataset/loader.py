"""Batches of a dataset, made in this process or in loader processes, which may die."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from dataset.lm_dataset import Batch, PretrainDataset
from dataset.records import DataError


def load_batches(
    data: PretrainDataset,
    batches: Iterable[list[int]],
    *,
    num_workers: int = 0,
    timeout: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of these rows, in their order.

    Args:
        num_workers: loader processes; 0: batches are made in this one.
        timeout: seconds after which a loader process that hands over nothing counts as lost.
        pin_memory: whether batches are copied to a CUDA device next.
    Raises: DataError if a loader process died or does not respond."""
    return from_loader(
        DataLoader(
            data,
            batch_sampler=batches,
            num_workers=num_workers,
            timeout=timeout if num_workers else 0,
            collate_fn=as_is,
            worker_init_fn=ignore_signals,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # without its own, a loader draws from the global one
        )
    )


def as_is(batch: Any) -> Any:
    """For DataLoader(collate_fn=...): ``PretrainDataset.__getitems__`` has collated already."""
    return batch


def ignore_signals(worker: int) -> None:
    """For DataLoader(worker_init_fn=...): the trainer alone answers a signal to its process group.

    The signal would end the loader's processes first, and with them the trainer, before it saves.
    """
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            signal.signal(number, signal.SIG_IGN)


def from_loader(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The loader's batches. Raises: DataError if one of its processes died or does not respond."""
    try:
        iterator = iter(batches)
        # torch's handler raises at any point, even during a save; the loader also checks by itself.
        # Windows has no such signal.
        if getattr(batches, "num_workers", 0) and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError) as error:
        is_lost = isinstance(error, ConnectionError | EOFError)  # died while handing over a batch
        if not is_lost and not str(error).startswith("DataLoader"):
            raise
        for process in multiprocessing.active_children():
            process.kill()  # a stuck one ignores gentler signals, and exiting would wait for it
        reason = "DataLoader: a worker is gone" if is_lost else str(error).splitlines()[0].rstrip()
        raise DataError(
            f"{reason.removesuffix('.')}. Often memory ran out: try a lower --num_workers."
        ) from None
