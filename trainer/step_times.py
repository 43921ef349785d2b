"""How the time of training is divided: data, forward and backward, exchange, optimizer, saving."""

import itertools
import time

import torch

PARTS = ("data", "forward_backward", "exchange", "optimizer", "evaluation", "saving")

# For each part, the share of the time above which it is reported, and the advice that is given.
ADVICE = {
    "data": (0.05, "more --num_workers, or a faster disk for --cache_dir"),
    "exchange": (0.20, "a larger --accumulation_steps: ranks exchange gradients once per update"),
    "optimizer": (0.20, "a larger --batch_size: the optimizer's time does not depend on it"),
    "evaluation": (0.10, "a larger --eval_interval, or fewer --eval_tokens"),
    "saving": (0.02, "a larger --save_interval"),
}


MAX_MARKS = 1000  # that are kept, each with an event on CUDA; then they are added up


class StepTimes:
    """Measures the seconds spent on each part of a step; a mark ends a part.

    On CUDA a mark is an event in the stream, so the host waits only in ``read``. The time of a part
    then includes the time in which the device waited for the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Start measuring now, and forget everything before."""
        self.marks: list[tuple[str, float]] = []  # on the CPU, with the time in seconds
        self.events: list[tuple[str, torch.cuda.Event]] = []  # on CUDA
        self.seconds: dict[str, float] = {}  # by part, until the marks that are kept
        self.mark("")

    def mark(self, part: str) -> None:
        """Attribute the time since the last mark to ``part``."""
        if len(self.marks) + len(self.events) == MAX_MARKS:
            self._add_up()
        if not self.on_cuda:
            return self.marks.append((part, time.perf_counter()))
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append((part, event))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call. Waits for the device."""
        self._add_up()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _add_up(self) -> None:
        """Move all that the marks tell into ``seconds``. Waits for the device."""
        if self.events:
            self.events[-1][1].synchronize()
        durations = [
            *((part, end - begin) for (_, begin), (part, end) in itertools.pairwise(self.marks)),
            *(
                (part, begin.elapsed_time(end) / 1000)  # from milliseconds
                for (_, begin), (part, end) in itertools.pairwise(self.events)
            ),
        ]
        for part, duration in durations:
            self.seconds[part] = self.seconds.get(part, 0.0) + duration
        self.marks, self.events = self.marks[-1:], self.events[-1:]


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each part's share of the total, in the order of PARTS."""
    total = max(sum(seconds.values()), 1e-9)
    return {part: seconds[part] / total for part in PARTS if part in seconds}


def bottleneck(time_shares: dict[str, float]) -> tuple[str, str] | None:
    """The part that exceeds its limit by the largest factor, and advice; None if no part does."""
    factors = {part: time_shares.get(part, 0.0) / limit for part, (limit, _) in ADVICE.items()}
    worst = max(factors, key=lambda part: factors[part])
    if factors[worst] <= 1:
        return None
    return worst, f"{time_shares[worst]:.0%} of the time goes to {worst}: try {ADVICE[worst][1]}"
