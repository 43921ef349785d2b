"""Communication between the ranks of a run: sums, broadcasts and waiting. Trivial for one process.

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

from trainer.errors import RankError, SettingsError, exit_status_of, is_out_of_memory, reason_of
from trainer.host import end_with_parent

T = TypeVar("T")
MAX_WORK_SECONDS = 24 * 3600.0  # one rank may tokenize a large corpus while the others wait
POLL_SECONDS = 0.02
ROLL_CALL_SECONDS = 15.0  # in which live ranks answer; torchrun kills them 30 s after a failure
BUCKET_BYTES = 2**22  # gradients are exchanged in buckets of about this size; docs/BENCHMARKS.md
# What torchrun sets beside MASTER_ADDR; other launchers set a part of it.
NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_PORT")
SERIAL_BACKENDS = ("gloo",)  # run one exchange at a time, see GradientSum._wait_for_last

_timeout_seconds = 600.0
_restarted = False
_store: dist.Store | None = None  # key-value store hosted by torchrun; it outlives the ranks
_work_numbers = itertools.count()  # numbers the calls of _on_first_machines; the same on all ranks


def rank() -> int:
    """The index of this process, 0 for a single one; available before the group is joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """True on rank 0, the process that prints and writes."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun has started this group before (``--max-restarts``)."""
    return _restarted


def init_distributed_mode(device: str = "cuda", timeout_seconds: float = 600) -> int:
    """Join the group that torchrun started, if any: with NCCL on CUDA, with gloo otherwise.

    Args: timeout_seconds: a rank that does not join an exchange for this long counts as lost.
    Returns: the index of this process on its machine, 0 without torchrun.
    Raises: RankError if a rank is missing, SettingsError if what torchrun sets is incomplete."""
    global _restarted, _store, _timeout_seconds
    if "RANK" not in os.environ:
        return 0
    unusable = [name for name in NUMBERS if not os.environ.get(name, "").isdecimal()]
    unusable += ["MASTER_ADDR"] * ("MASTER_ADDR" not in os.environ)
    if unusable:
        raise SettingsError(
            f"RANK is set in the environment, but {', '.join(unusable)} "
            f"{'is' if len(unusable) == 1 else 'are'} missing or not a number: start it with "
            f"torchrun, or unset RANK to train on one device."
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    _timeout_seconds, timeout = timeout_seconds, timedelta(seconds=timeout_seconds)
    try:
        shared, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        start = _agree_on_start(shared, rank, world_size)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"the ranks cannot connect at {where}: {str(error).splitlines()[0]}"
        ) from None
    if "TORCHELASTIC_RUN_ID" in os.environ:  # not of ranks that somebody started one by one
        end_with_parent()
    _store = dist.PrefixStore(f"start/{start}", shared)
    _store.set(f"host/{rank}", socket.gethostname())
    with exchange():
        dist.init_process_group(
            backend, store=_store, rank=rank, world_size=world_size, timeout=timeout
        )
    counted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    _restarted = totals(start > 1 or counted)[0] > 0
    return local_rank


def _agree_on_start(store: dist.Store, rank: int, world_size: int) -> int:
    """Wait for all ranks, and agree on the number of this start of the group, counted from 1.

    torchrun keeps its store across restarts, so a rank could read an address that a dead rank
    left there, and its restart count differs between machines (pytorch issue 135712). Therefore
    each rank publishes a token that is unique to this start, and rank 0 answers the token.

    Raises: RankError."""
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f"token/{rank}", token)
        keys = [f"answer/{token}"]
        number = int(_wait_for_keys(store, keys, _timeout_seconds + ROLL_CALL_SECONDS)[0])
        store.set(f"met/{number}/{rank}", "")
        return number
    number, since = store.add("starts", 1), time.monotonic()
    absent = list(range(1, world_size))
    while absent:
        for r in absent:
            if store.check([f"token/{r}"]):  # if a dead rank left it, nobody reads the answer
                store.set(f"answer/{store.get(f'token/{r}').decode()}", str(number))
        absent = [r for r in absent if not store.check([f"met/{number}/{r}"])]
        if time.monotonic() - since > _timeout_seconds:
            raise RankError(f"ranks {absent} did not join within {_timeout_seconds:,.0f} s")
        time.sleep(POLL_SECONDS)
    return number


def _joined_store() -> dist.Store:
    """The store of this start of the group. Raises: RuntimeError if no group was joined."""
    if _store is None:
        raise RuntimeError("init_distributed_mode() did not join a group")
    return _store


def close() -> None:
    """Leave the group. Not for error paths: it may wait for the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def uses_nccl() -> bool:
    """Whether a group is joined whose exchanges run on devices."""
    return dist.is_initialized() and "nccl" in dist.get_backend()


@contextlib.contextmanager
def exchange() -> Generator[None]:
    """Wraps every collective operation, so that its failure names the missing ranks.

    Raises: RankError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "out of memory" in reason:
            raise
        traceback.clear_frames(error.__traceback__)  # they keep the group alive; it must be left
        raise _roll_call(reason) from error


def _roll_call(reason: str) -> RankError:
    """Report that this rank is alive, wait for the others to do so, and name those that do not."""
    own, ranks = rank(), range(world_size())
    try:
        store = _joined_store()
        store.set(f"alive/{own}", "")
        if dist.is_initialized() and dist.get_backend() == "gloo":  # with NCCL, leaving might block
            dist.destroy_process_group()  # ranks that wait for this one fail, and answer in turn
        silent, since = list(ranks), time.monotonic()
        while len(silent) > 1 or time.monotonic() - since < 1:
            if time.monotonic() - since > ROLL_CALL_SECONDS:
                break
            time.sleep(POLL_SECONDS)
            silent = [r for r in silent if not store.check([f"alive/{r}"])]
        names = [f"rank {r} on {store.get(f'host/{r}').decode()}" for r in silent]
    except RuntimeError:
        return RankError("the machine of rank 0 is gone")
    first = next((r for r in ranks if r not in silent), 0)
    missing = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} dead or stuck: no answer"
    return RankError(
        f"{missing if names else 'the ranks lost their connection'} ({reason:.120}). The same "
        f"command with --from_resume 1 resumes from the last saved state.",
        prints=own == first,
    )


def totals(*numbers: float) -> list[float]:
    """Each number, summed over all ranks. Exchanged on the CPU, so it does not sync the device."""
    box = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        with exchange():
            dist.all_reduce(box)
    return box.tolist()


class GradientSum:
    """Replaces gradients by their sums over all ranks, overlapping with the last backward pass.

    Parameters are grouped into buckets in reverse order, in which their gradients become ready. A
    full bucket is sent while the gradients of earlier layers are still being computed. This is not
    DistributedDataParallel because that rebuilds its buckets after the first update: with three or
    more ranks, a resumed run would then add in a different order."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        self.sent: list[tuple[Tensor, Tensor, dist.Work]] = []  # (gradients, was finite, exchange)
        self.missing: list[int] | None = None  # gradients per bucket; None before the last pass
        if world_size() == 1:
            return
        self.serial = dist.get_backend() in SERIAL_BACKENDS
        size_bytes = BUCKET_BYTES
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            if size_bytes >= BUCKET_BYTES:
                self.buckets.append([])
                size_bytes = 0
            self.buckets[-1].append(parameter)
            size_bytes += parameter.nbytes
        for i, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._ready, i))

    def send_when_ready(self) -> None:
        """Announce that the next backward pass is the last one of the update."""
        self.missing = [len(bucket) for bucket in self.buckets]

    def _ready(self, i: int, _: nn.Parameter) -> None:
        if self.missing is None:
            return
        self.missing[i] -= 1
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
            if self.serial and self.sent and not self.sent[-1][2].is_completed():
                break  # the next gradient tries again
            with exchange():
                self._send()  # in the same order on all ranks, or different buckets would be added

    def _send(self) -> None:
        sent, self.sent = self.sent, []  # if this fails, nothing may keep the group alive
        self._wait_for_last(sent)
        bucket = self.buckets[len(sent)]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        )
        finite = torch.isfinite(flat).all()
        self.sent = [*sent, (flat, finite, dist.all_reduce(flat, async_op=True))]

    def _wait_for_last(self, sent: list[tuple[Tensor, Tensor, dist.Work]]) -> None:
        """With gloo, only one exchange may be in flight. If one of two fails because a rank died,
        gloo stops reading from that connection (gloo/transport/tcp/pair.cc, prepareRead), and the
        other blocks until it times out."""
        if self.serial and sent:
            sent[-1][2].wait()

    def sum_over_ranks(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Send the remaining buckets and ``sums``, shape (N,), and wait for all exchanges.

        Returns: ``sums`` added up over all ranks, and (world_size,) nonzero for each rank whose own
        contribution was not finite."""
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
        self._wait_for_last(sent)
        dist.all_reduce(last)
        for bucket, (flat, _, work) in zip(self.buckets, sent, strict=True):
            work.wait()
            for p, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = gradient.view_as(p)
        sums, culprits = last.split([len(sums), world_size()])
        return sums, culprits


def gather(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank. For small picklable objects."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    with exchange():
        dist.all_gather_object(values, value)
    return values


def on_all_ranks(work: Callable[[], T]) -> T:
    """Run ``work()`` on every rank.

    Raises: on every rank if it failed on any: its own error where it has one, elsewhere an
    OutOfMemoryError or a RuntimeError that names another's."""
    result, error, failure = [], None, None
    try:
        result.append(work())
    except Exception as raised:
        if hasattr(raised, "exit_status"):  # the run ends
            raise
        error, failure = raised, (is_out_of_memory(raised), reason_of(raised))
    failures = gather(failure)
    if error:
        raise error
    for out_of_memory, reason in filter(None, failures):
        kind = torch.OutOfMemoryError if out_of_memory else RuntimeError
        raise kind(f"on another rank: {reason}")
    return result[0]


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if world_size() > 1:
        with exchange():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main_process(work: Callable[[], T]) -> T:
    """Run ``work()`` on rank 0 while the others wait. Returns and raises as ``on_each_machine``."""
    return _on_first_machines(work, 1, 6 * _timeout_seconds)


def on_each_machine(work: Callable[[], T]) -> T:
    """Run ``work()`` on one process per machine while the others wait, for hours if necessary.

    Returns: rank 0's result, on every rank. If the work fails anywhere, all ranks stop: those that
    ran it raise its error, the others exit with its ``exit_status``."""
    return _on_first_machines(work, int(os.environ.get("GROUP_WORLD_SIZE", "1")), MAX_WORK_SECONDS)


def _on_first_machines(work: Callable[[], T], num_machines: int, timeout_seconds: float) -> T:
    if world_size() == 1:
        return work()
    number, machine = next(_work_numbers), int(os.environ["GROUP_RANK"])
    store, results, statuses = _joined_store(), [], []
    if os.environ["LOCAL_RANK"] == "0" and machine < num_machines:
        status = ""
        try:
            results.append(work())
        except BaseException as error:  # a signal must not leave the others waiting either
            status = str(exit_status_of(error))
            raise
        finally:
            with contextlib.suppress(RuntimeError):
                store.set(f"work/{number}/{machine}", status)
    keys = [f"work/{number}/{i}" for i in range(num_machines)]
    # The store ends with torchrun. Then the exchange waits, or fails with a rank, by itself.
    with contextlib.suppress(RuntimeError):
        statuses = _wait_for_keys(store, keys, timeout_seconds)
    for status in statuses:
        if status:
            sys.exit(int(status))
    return broadcast(results)[0]  # rank 0 always has a result


def _wait_for_keys(store: dist.Store, keys: list[str], timeout_seconds: float) -> list[bytes]:
    """Wait until all keys are set. Polls, so that Python can handle signals in between.

    Returns: their values.
    Raises: RankError after ``timeout_seconds``; RuntimeError if the store cannot be reached."""
    since = time.monotonic()
    while not store.check(keys):
        if time.monotonic() - since > timeout_seconds:
            raise RankError(f"another rank is stuck: no result for {timeout_seconds:,.0f} s")
        time.sleep(POLL_SECONDS)
    return [store.get(key) for key in keys]
