"""Ranks: who am I, add this up over all of us, wait for each other. Alone, all of it is trivial.

The only file that imports torch.distributed.
"""

import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a dead rank is noticed after this
PATIENT_TIMEOUT = timedelta(hours=24)  # one rank may tokenize a large corpus meanwhile


def rank() -> int:
    """This process's number among all, 0 when alone; known before the group is joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def init_distributed_mode(device: str = "cuda") -> int:
    """Join the group that torchrun started, if it did: NCCL for CUDA, gloo for the rest.

    Returns: this process's number on its machine, 0 without torchrun."""
    if "RANK" not in os.environ:
        return 0
    local_rank = int(os.environ["LOCAL_RANK"])
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return local_rank


def close() -> None:
    """Leave the group; only on the clean path, since it may wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(number: float) -> float:
    """The sum over all ranks of one number each. Travels on the CPU: no device is waited for."""
    if world_size() == 1:
        return number
    box = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(box)
    return box.item()


def sum_tensor(tensor: Tensor) -> Tensor:
    """The sum over all ranks, on every rank, without waiting for the device."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all ranks, in one exchange.

    One flat buffer rather than DistributedDataParallel: that one lays out its buckets anew after
    the first update, so from three ranks on a resumed run would add in another order."""
    if world_size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for parameter, summed in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = summed.view_as(parameter)


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. Small picklable things only."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def first_on_each_machine(work: Callable[[], T], *, alone: bool = False) -> T:
    """``work()`` on one process of each machine (``alone``: on rank 0 only) while the others wait.

    Returns: rank 0's result, on every rank. If the work raises anywhere, every rank stops: those
    that worked raise it, the others exit with its ``exit_status``."""
    if world_size() == 1:
        return work()
    works = is_main_process() if alone else os.environ["LOCAL_RANK"] == "0"
    result, failure = None, None
    if works:
        try:
            result = work()
        except Exception as error:
            failure = error
    patient = dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT)
    outcomes: list = [None] * world_size()
    status = None if failure is None else getattr(failure, "exit_status", 1)
    dist.all_gather_object(outcomes, status, group=patient)
    dist.destroy_process_group(patient)
    if failure is not None:
        raise failure
    for outcome in outcomes:
        if outcome is not None:
            sys.exit(outcome)
    return broadcast(result)
