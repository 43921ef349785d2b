"""The learning rate: a pure function of the share of the run that is done."""

import math

SCHEDULES = ("cosine", "wsd")


def get_lr(current: float, total: float, lr: float) -> float:
    """The learning rate at ``current`` of ``total``: a cosine from ``lr`` to a tenth of it."""
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * current / total)))


def learning_rate(
    before: float,
    after: float,
    peak: float,
    schedule: str = "cosine",
    warmup_ratio: float = 0.0,
    decay_ratio: float = 0.4,
) -> float:
    """The rate of the update that takes the run from the share ``before`` to ``after``.

    Args:
        schedule: cosine falls from the end of the warm-up to a tenth of ``peak``; wsd stays at
            ``peak`` and falls along a line to zero in the last ``decay_ratio`` of the run.
        warmup_ratio: share of the run in which the rate rises from zero along a line.
    Source: cosine as MiniMind's; warm-up, stable, decay: MiniCPM (Hu et al. 2024), section 4."""
    if before < warmup_ratio:
        return peak * min(after / warmup_ratio, 1)
    if schedule == "cosine":
        return get_lr(before - warmup_ratio, 1 - warmup_ratio, peak)
    return peak * min((1 - before) / decay_ratio, 1)
