"""Where a step's time goes: waiting for data, forward and backward, exchange, optimizer, saving."""

import itertools
import time

import torch

PARTS = ("data", "forward_backward", "exchange", "optimizer", "evaluation", "saving")

# A part that takes more than this share of the time is named, with what helps against it.
ADVICE = {
    "data": (0.05, "more --num_workers, or a faster disk for --cache_dir"),
    "exchange": (0.20, "a larger --accumulation_steps: ranks exchange gradients once an update"),
    "optimizer": (0.20, "a larger --batch_size: the optimizer costs the same whatever it is"),
    "evaluation": (0.10, "a larger --eval_interval, or fewer --eval_tokens"),
    "saving": (0.02, "a larger --save_interval"),
}


class StepTimes:
    """Seconds by part, since the last ``read``. A mark ends what ran since the mark before.

    On CUDA a mark is an event in the device's queue, and the host waits for none until ``read``.
    A part then holds what the device did, and its waiting for the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget all before now."""
        self.marks: list[tuple[str, float]] = []  # seconds, by the host's clock
        self.events: list[tuple[str, torch.cuda.Event]] = []  # on CUDA, in place of marks
        self.mark("")

    def mark(self, part: str) -> None:
        """What ran since the last mark was this part."""
        if not self.on_cuda:
            return self.marks.append((part, time.perf_counter()))
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append((part, event))

    def read(self) -> dict[str, float]:
        """Seconds of each part that was marked; waits for the device."""
        if self.events:
            self.events[-1][1].synchronize()
        lasted = [
            *((part, end - begin) for (_, begin), (part, end) in itertools.pairwise(self.marks)),
            *(
                (part, begin.elapsed_time(end) / 1000)  # from milliseconds
                for (_, begin), (part, end) in itertools.pairwise(self.events)
            ),
        ]
        seconds: dict[str, float] = {}
        for part, duration in lasted:
            seconds[part] = seconds.get(part, 0.0) + duration
        self.marks, self.events = self.marks[-1:], self.events[-1:]
        return seconds


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each part's share of the sum, in the order of PARTS."""
    total = max(sum(seconds.values()), 1e-9)
    return {part: seconds[part] / total for part in PARTS if part in seconds}


def bottleneck(found: dict[str, float]) -> tuple[str, str] | None:
    """The part that most exceeds its share, and a line that says what helps; None if none does."""
    excess = {p: found.get(p, 0.0) / limit for p, (limit, _) in ADVICE.items()}
    worst = max(excess, key=lambda part: excess[part])
    if excess[worst] <= 1:
        return None
    return worst, f"{found[worst]:.0%} of the time goes to {worst}: try {ADVICE[worst][1]}"
