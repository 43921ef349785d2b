"""Ranks: who am I, add this up over all of us, wait for each other. Alone, all of it is trivial.

The only file that imports torch.distributed.
"""

import contextlib
import itertools
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Iterable
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from trainer.errors import RankError, exit_status_of

T = TypeVar("T")
PATIENCE = 24 * 3600.0  # seconds; a rank may tokenize a large corpus meanwhile
POLL = 0.02  # seconds between two looks whether that rank is done
BUCKET_BYTES = 2**22  # of gradients that travel together; see docs/BENCHMARKS.md
ONE_BY_ONE = ("gloo",)  # backends of which one exchange at a time is asked, see GradientSum
ROLL_CALL = 15.0  # seconds in which ranks that are alive answer; torchrun kills them after 30

_timeout = 600.0  # seconds
_restarted = False
_store: dist.Store | None = None  # what torchrun keeps for its ranks; it outlives any of them
_works = itertools.count()  # numbers the calls of _on_first_machines, alike on all ranks


def rank() -> int:
    """This process's number among all, 0 when alone; known before the group is joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def restarted() -> bool:
    """True if torchrun has started this group before (``--max-restarts``)."""
    return _restarted


def init_distributed_mode(device: str = "cuda", timeout_seconds: float = 600) -> int:
    """Join the group that torchrun started, if it did: NCCL for CUDA, gloo for the rest.

    Args: timeout_seconds: a rank that does not come to an exchange for so long counts as lost.
    Returns: this process's number on its machine, 0 without torchrun.
    Raises: RankError if not all of them come."""
    global _restarted, _store, _timeout
    if "RANK" not in os.environ:
        return 0
    local_rank = int(os.environ["LOCAL_RANK"])
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    _timeout, timeout = timeout_seconds, timedelta(seconds=timeout_seconds)
    try:
        shared, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        start = _meet(shared, rank, world_size)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(f"the ranks do not meet at {where}: {str(error).splitlines()[0]}") from None
    _store = dist.PrefixStore(f"start/{start}", shared)
    _store.set(f"host/{rank}", socket.gethostname())
    with exchange():
        dist.init_process_group(
            backend, store=_store, rank=rank, world_size=world_size, timeout=timeout
        )
    counted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    _restarted = totals(start > 1 or counted)[0] > 0
    return local_rank


def _meet(store: dist.Store, rank: int, world_size: int) -> int:
    """Wait until every rank is there, and agree on a number for this start of the group, from 1.

    torchrun keeps the store over restarts: whoever reads there what a dead rank left calls a port
    where nobody answers, and torchrun's own count of restarts differs between machines (pytorch's
    issue 135712). So each rank shows a token that no other start has, and rank 0 answers it.

    Raises: RankError."""
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f"token/{rank}", token)
        number = int(_await(store, [f"answer/{token}"], _timeout + ROLL_CALL)[0])
        store.set(f"met/{number}/{rank}", "")
        return number
    number, since = store.add("starts", 1), time.monotonic()
    absent = list(range(1, world_size))
    while absent:
        for r in absent:
            if store.check([f"token/{r}"]):  # of a dead one, perhaps: that answer nobody reads
                store.set(f"answer/{store.get(f'token/{r}').decode()}", str(number))
        absent = [r for r in absent if not store.check([f"met/{number}/{r}"])]
        if time.monotonic() - since > _timeout:
            raise RankError(f"ranks {absent} did not come within {_timeout:,.0f} s")
        time.sleep(POLL)
    return number


def _joined_store() -> dist.Store:
    """The store of this start of the group. Raises: RuntimeError unless the group was joined."""
    if _store is None:
        raise RuntimeError("init_distributed_mode() did not join a group")
    return _store


def close() -> None:
    """Leave the group; only on the clean path, since it may wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def exchange() -> Generator[None]:
    """Every exchange happens inside, so that its failure names the ranks that are missing.

    Raises: RankError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "out of memory" in reason:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the group, which is to be left
        raise _roll_call(reason) from error


def _roll_call(reason: str) -> RankError:
    """Say that this rank is alive, wait until the others did, and tell who did not."""
    own, ranks = rank(), range(world_size())
    try:
        store = _joined_store()
        store.set(f"alive/{own}", "")
        if dist.get_backend() == "gloo":  # NCCL might wait here
            dist.destroy_process_group()  # who waits for this rank notices, and answers, too
        silent, since = list(ranks), time.monotonic()
        while len(silent) > 1 or time.monotonic() - since < 1:
            if time.monotonic() - since > ROLL_CALL:
                break
            time.sleep(POLL)
            silent = [r for r in silent if not store.check([f"alive/{r}"])]
        names = [f"rank {r} on {store.get(f'host/{r}').decode()}" for r in silent]
    except RuntimeError:
        return RankError("the machine of rank 0 is gone")
    first = next((r for r in ranks if r not in silent), 0)
    missing = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} dead or stuck: no answer"
    return RankError(
        f"{missing if names else 'the ranks lost their connection'} ({reason:.120}). The same "
        f"command with --from_resume 1 resumes from the last saved state.",
        speaks=own == first,
    )


def totals(*numbers: float) -> list[float]:
    """The sum over all ranks of each number. Travels on the CPU: no device is waited for."""
    box = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        with exchange():
            dist.all_reduce(box)
    return box.tolist()


class GradientSum:
    """Replaces gradients by their sums over all ranks, while the last backward pass runs.

    Parameters lie in buckets, the model's last first, as their gradients become ready; a full one
    is sent while those of earlier layers are computed. Our own rather than those of
    DistributedDataParallel: that one rebuilds its buckets after the first update, so from
    three ranks on a resumed run would add in another order."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        self.sent: list[tuple[Tensor, Tensor, dist.Work]] = []  # sum to be, was finite, on its way
        self.missing: list[int] | None = None  # gradients by bucket; None: not the last pass
        if world_size() == 1:
            return
        self.one_by_one = dist.get_backend() in ONE_BY_ONE
        size = BUCKET_BYTES
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            if size >= BUCKET_BYTES:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.nbytes
        for i, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._ready, i))

    def send_when_ready(self) -> None:
        """The next backward pass is the update's last."""
        self.missing = [len(bucket) for bucket in self.buckets]

    def _ready(self, i: int, _: nn.Parameter) -> None:
        if self.missing is None:
            return
        self.missing[i] -= 1
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
            if self.one_by_one and self.sent and not self.sent[-1][2].is_completed():
                break  # the next gradient looks again
            with exchange():
                self._send()  # in one order on all ranks, else they would add what differs

    def _send(self) -> None:
        sent, self.sent = self.sent, []  # if this fails, nothing may hold the group
        self._end_last(sent)
        bucket = self.buckets[len(sent)]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        )
        finite = torch.isfinite(flat).all()
        self.sent = [*sent, (flat, finite, dist.all_reduce(flat, async_op=True))]

    def _end_last(self, sent: list[tuple[Tensor, Tensor, dist.Work]]) -> None:
        """With gloo nothing is sent before what was sent last has arrived: if one of two exchanges
        fails, since a rank died, gloo stops reading what comes for it (gloo/transport/tcp/pair.cc,
        prepareRead), and the other one waits behind it until its time is over."""
        if self.one_by_one and sent:
            sent[-1][2].wait()

    def sum_over_ranks(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Send what is left, with ``sums`` (N,), and wait for all.

        Returns: ``sums`` over all ranks, and (world_size,) not zero where a rank's own part was
        not finite."""
        if world_size() == 1:
            return sums, torch.zeros(1, device=sums.device)
        with exchange():
            return self._finish(sums)

    def _finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        while len(self.sent) < len(self.buckets):
            self._send()
        sent, self.sent, self.missing = self.sent, [], None
        finite = torch.stack([torch.isfinite(sums).all(), *(finite for _, finite, _ in sent)]).all()
        culprits = torch.zeros(world_size(), device=sums.device)
        culprits[rank()] = ~finite
        last = torch.cat([sums, culprits])
        self._end_last(sent)
        dist.all_reduce(last)
        for bucket, (flat, _, work) in zip(self.buckets, sent, strict=True):
            work.wait()
            for p, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = gradient.view_as(p)
        sums, culprits = last.split([len(sums), world_size()])
        return sums, culprits


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. Small picklable things only."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    with exchange():
        dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    if world_size() > 1:
        with exchange():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main_process(work: Callable[[], T]) -> T:
    """``work()`` on rank 0 while the others wait. Returns and raises: as below."""
    return _on_first_machines(work, 1, 6 * _timeout)


def on_each_machine(work: Callable[[], T]) -> T:
    """``work()`` on one process of each machine while the others wait; for hours, if need be.

    Returns: rank 0's result, on every rank. If the work raises anywhere, every rank stops: those
    that worked raise it, the others exit with its ``exit_status``."""
    return _on_first_machines(work, int(os.environ.get("GROUP_WORLD_SIZE", "1")), PATIENCE)


def _on_first_machines(work: Callable[[], T], num_machines: int, patience: float) -> T:
    if world_size() == 1:
        return work()
    number, machine = next(_works), int(os.environ["GROUP_RANK"])
    store, results = _joined_store(), []
    if os.environ["LOCAL_RANK"] == "0" and machine < num_machines:
        status = ""
        try:
            results.append(work())
        except BaseException as error:  # a signal, too, must not leave the others waiting
            status = str(exit_status_of(error))
            raise
        finally:
            store.set(f"work/{number}/{machine}", status)
    keys = [f"work/{number}/{i}" for i in range(num_machines)]
    for status in _await(store, keys, patience):
        if status:
            sys.exit(int(status))
    return broadcast(results)[0]  # rank 0 always has one


def _await(store: dist.Store, keys: list[str], patience: float) -> list[bytes]:
    """Wait for these keys, in small steps so that signals are heard in between.

    Raises: RankError after so many seconds, or if the store is gone."""
    since = time.monotonic()
    try:
        while not store.check(keys):
            if time.monotonic() - since > patience:
                raise RankError(f"nothing from the first rank for {patience:,.0f} s: it is stuck")
            time.sleep(POLL)
        return [store.get(key) for key in keys]
    except RuntimeError as error:
        raise RankError("the machine of rank 0 is gone") from error
