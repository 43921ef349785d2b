"""What the held-out loss will be at the end of the run, as a range.

The annealing law says how a loss falls with the sum of the learning rates so far, and with the rate
itself: log L = c + a (S^-EXPONENT - 1) + b r, with S the sum over that of the whole run and r the
rate over its peak. A run that has not lowered its rate yet cannot tell b, and hardly a; both are
taken to be like those of runs that were made for it, see docs/RECIPES.md, until its own losses say
more. What the law leaves over is correlated noise.

Source: the law's form is that of Tissue et al. 2024, arXiv 2408.11029, here for the logarithm, so
that it does not matter what text a loss is of, and with the rate in place of the annealed area.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.auto import weights_in_layers
from trainer.bigrams import nats_of_pairs
from trainer.run import Run
from trainer.schedule import learning_rate

EXPONENT = 0.3
EARLIEST = 0.15  # share of the run: what happens before tells too little
WINDOW = 0.3  # of what was seen, the first part is left out: there the law does not hold
REACH = 0.5  # of what the law leaves over, in log(share)
SCORE_NOISE = 0.001  # of a held-out loss, relative
LEAST_NOISE = 0.004  # of a training loss
MOST_POINTS = 40  # of each kind
QUANTILE = 1.645  # deviations, between which nine of ten lie
ROWS_COUNTED = 4096  # at once
STEPS = 1000  # of the sum over the schedule
UNKNOWN = 25.0  # variance of c


Points = list[tuple[float, float]]  # share of the run that was done, loss


class Prior(NamedTuple):
    """Of a kind of text: means and covariance of a and b before the run's own losses are known, and
    the deviation of what the law leaves over."""

    a: float
    b: float
    var_a: float
    cov: float
    var_b: float
    left_over: float


# Measured on runs of ours: docs/RECIPES.md.
FROM_RANDOM = Prior(0.156, 0.036, 0.0047, -0.0005, 0.0008, 0.012)
FROM_COUNTS = Prior(0.128, 0.088, 0.0024, -0.0001, 0.0003, 0.012)
FEW_SENTENCES = Prior(0.88, 0.54, 0.10, 0.02, 0.03, 0.05)  # in many variants, as the demo's text

# With --recipe best, held-out bits per byte over those of counts of pairs: the logarithm by those
# of millions of tokens and of weights in layers, their product and squares; what that leaves over.
BELOW_PAIRS, PAIRS_LEFT_OVER = (-0.1180, -0.0543, -0.0234, -0.0052, -0.0129, 0.0033), 0.03
MEASURED_TOKENS, MEASURED_WEIGHTS = (1e5, 1.2e7), (2e5, 2.5e7)
PAIRS = "pairs_bits_per_byte"  # in the records
# Correlation of its errors with those of the run's own losses: a text in which there is more to
# learn than pairs tell also falls further.
IN_COMMON = 0.5


class Forecast(NamedTuple):
    """Held-out bits per byte at the end; nine of ten runs end between ``low`` and ``high``."""

    low: float
    expected: float
    high: float
    half: float  # expected if the run had half of its tokens
    twice: float


def forecast_of(run: Run, newest: dict) -> Forecast | None:
    """What the run's records, and the newest one that is not among them yet, tell of its end; None
    before EARLIEST, at the end, of a model that was trained before, and on all ranks but the first,
    which have no records.

    Records without a ``progress``, of earlier versions, do not count."""
    args = run.args
    if not run.records or newest["progress"] >= 1 or args.from_weight != "none":
        return None
    at_random = args.embedding_init == "random"
    # A start from counts knew the rows before, and so does a model that has seen them.
    held_out, training = losses_of([*run.records, newest], run.rows_per_epoch if at_random else 0)
    rate = rate_of(args.lr_schedule, args.warmup_ratio, args.decay_ratio)
    pairs = score_of_pairs(run, None)
    num_tokens = run.total_rows * args.row_length
    by_pairs = None if pairs is None else forecast_from_pairs(run, pairs, num_tokens)
    return forecast(held_out, training, rate, priors_for(at_random), by_pairs)


def losses_of(records: Sequence[dict], new_rows: float) -> tuple[Points, Points]:
    """By share of the run, the held-out bits per byte of these records, and the training losses of
    the first ``new_rows``, at the middle of what each is a mean of.

    Records without a ``progress``, of other plans or earlier versions, do not count."""
    held_out, training, before = Points(), Points(), 0.0
    for record in records:
        share = record.get("progress")
        if share and "heldout_bits_per_byte" in record:
            held_out.append((share, record["heldout_bits_per_byte"]))
        if share and "loss" in record and record["rows"] <= new_rows:
            training.append(((before + share) / 2, record["loss"]))
            before = share
    return held_out, training


def priors_for(at_random: bool) -> tuple[Prior, Prior]:
    """Those of models that begin at random, or from counts."""
    return FROM_RANDOM if at_random else FROM_COUNTS, FEW_SENTENCES


def rate_of(schedule: str, warmup_ratio: float, decay_ratio: float) -> Callable[[float], float]:
    """The learning rate over its peak, by share of the run."""
    return lambda share: learning_rate(share, share, 1.0, schedule, warmup_ratio, decay_ratio)


def forecast_before(run: Run, held_out: Any, num_tokens: float) -> str:
    """What the log says of the loss before the run: a range, or why there is none."""
    pairs = score_of_pairs(run, held_out)
    found = None if pairs is None else forecast_from_pairs(run, pairs, num_tokens)
    if pairs is None or found is None:
        tokens, weights = (
            " to ".join(f"{n / 1e6:g}M" for n in ends)
            for ends in (MEASURED_TOKENS, MEASURED_WEIGHTS)
        )
        return (
            f"its loss is foretold from {EARLIEST:.0%} of the run on; before, only with "
            f"--recipe best, one whole pass, {tokens} tokens and {weights} weights in layers"
        )
    return f"{described(found)}; for ordinary text, by its {pairs:.4f} for pairs of tokens"


def score_of_pairs(run: Run, held_out: Any | None) -> float | None:
    """Held-out bits per byte by the counts of neighbouring tokens that the model began with; None
    if it did not, or if nothing is held out."""
    for record in run.records:
        score = record.get(PAIRS)
        if isinstance(score, float) and 0 < score < math.inf:  # a file may say anything
            return score
    if run.pairs is None or held_out is None:
        return None
    nats = nats_of_pairs(run.pairs, batches(held_out))
    return nats / math.log(2) / held_out.num_text_bytes


def forecast_from_pairs(run: Run, pairs: float, num_tokens: float) -> Forecast | None:
    """As ``forecast_by_pairs``; None also for a run unlike those that it was measured on.

    Args: pairs: as from ``score_of_pairs``; num_tokens: of the whole run."""
    args = run.args
    passes = num_tokens / (run.rows_per_epoch * args.row_length)
    # The counts are of one pass: a shorter run knows more than by its own text.
    if args.recipe != "best" or not args.packing or not 0.9 <= passes <= 1.1:
        return None
    return forecast_by_pairs(pairs, num_tokens, weights_in_layers(run.model))


def forecast_by_pairs(pairs: float, num_tokens: float, weights: float) -> Forecast | None:
    """What one pass with ``--recipe best`` ends at, going by what counts of pairs of tokens score;
    None for sizes that were not measured.

    Args: pairs: held-out bits per byte; weights: of the model's layers."""
    for size, (least, most) in ((num_tokens, MEASURED_TOKENS), (weights, MEASURED_WEIGHTS)):
        if not least <= size <= most:
            return None
    expected, half, twice = (
        pairs * below_pairs(num_tokens * times, weights) for times in (1, 0.5, 2)
    )
    spread = math.exp(QUANTILE * PAIRS_LEFT_OVER)
    return Forecast(expected / spread, expected, expected * spread, half, twice)


def below_pairs(num_tokens: float, weights: float) -> float:
    """How much lower a run ends than the counts of pairs of tokens in its text."""
    features = features_of(num_tokens, weights)
    return math.exp(sum(a * b for a, b in zip(BELOW_PAIRS, features, strict=True)))


def features_of(num_tokens: float, weights: float) -> tuple[float, ...]:
    """What the numbers of BELOW_PAIRS are multiplied by."""
    n, d = math.log(weights / 1e6), math.log(num_tokens / 1e6)
    return 1.0, d, n, d * n, d**2, n**2


def batches(data: Any) -> Iterator[Any]:
    """All rows of a dataset, ROWS_COUNTED at a time."""
    for first in range(0, len(data), ROWS_COUNTED):
        yield data.__getitems__([*range(first, min(first + ROWS_COUNTED, len(data)))])


def described(found: Forecast) -> str:
    """The forecast as a line of the log."""
    return (
        f"{found.expected:.4f} bits/byte at the end, in nine of ten runs between {found.low:.4f} "
        f"and {found.high:.4f}; about {found.half:.4f} with half of the tokens, {found.twice:.4f} "
        f"with twice as many"
    )


def forecast(
    held_out: Points,
    training: Points,
    rate: Callable[[float], float],
    priors: Sequence[Prior],
    by_pairs: Forecast | None = None,
) -> Forecast | None:
    """The held-out loss at the end of the run; None if no point of it can be used yet.

    Args:
        held_out: share of the run that was done and bits per byte, by time.
        training: the same with training losses in nats; their fall is used, not their height. Empty
            for a run that has seen its rows before, or whose start knew them.
        rate: the learning rate over its peak, by share of the run.
        priors: of kinds of text; the one that the losses speak for is used.
        by_pairs: what is known besides, of text of the first kind."""
    now = held_out[-1][0] if held_out else 0.0
    if now < EARLIEST:
        return None
    scores, losses = (used(points, WINDOW * now) for points in (held_out, training))
    points = [*scores, *losses]
    x, y = torch.tensor(points, dtype=torch.float64).T
    y = y.log()
    is_loss = torch.arange(len(points)) >= len(scores)
    noise = torch.where(is_loss, noise_of(y[is_loss]), SCORE_NOISE)

    law = torch.tensor(law_of(rate, [*x.tolist(), 1.0]), dtype=torch.float64)  # (points + 1, 2)
    # One more point than was seen, which is the end, of the kind that is held out. Losses of
    # different kinds have a height each.
    kind = torch.cat((is_loss, torch.tensor([False])))
    at = torch.cat((x, torch.ones(1))).log()
    apart = (at[:, None] - at).abs() / REACH
    rest = UNKNOWN * (kind[:, None] == kind).double()
    rest[:-1, :-1] += noise.square().diag()
    judged = [judge(y, law, rest + p.left_over**2 * (-apart).exp(), p) for p in priors]
    _, found = best = max(judged, key=lambda pair: pair[0])
    return combined(found, by_pairs) if by_pairs and best is judged[0] else found


def combined(one: Forecast, other: Forecast) -> Forecast:
    """What two tell together: the weighed mean of their logarithms that has the least deviation,
    if IN_COMMON is how far their errors are the same."""
    a, b = (math.log(f.high / f.expected) / QUANTILE for f in (one, other))
    both = IN_COMMON * a * b
    share = min(max((b**2 - both) / (a**2 + b**2 - 2 * both), 0.0), 1.0)
    rest = 1 - share
    variance = (share * a) ** 2 + (rest * b) ** 2 + 2 * share * rest * both
    _, expected, _, half, twice = (x**share * y**rest for x, y in zip(one, other, strict=True))
    factor = math.exp(QUANTILE * math.sqrt(variance))
    return Forecast(expected / factor, expected, expected * factor, half, twice)


def judge(y: Tensor, law: Tensor, rest: Tensor, prior: Prior) -> tuple[float, Forecast]:
    """The logarithm of how probable what was seen is with this prior, and what follows from it.

    Args: y: (K,) logarithms of losses; law: (K + 1, 2), the last one of the end; rest: (K + 1,
        K + 1) covariance of all that the law does not explain."""
    expected = torch.tensor([prior.a, prior.b], dtype=torch.float64)
    spread = torch.tensor([[prior.var_a, prior.cov], [prior.cov, prior.var_b]], dtype=torch.float64)
    total, mean = law @ spread @ law.T + rest, law @ expected
    seen, unexplained = total[:-1, :-1], y - mean[:-1]
    weighed = torch.linalg.solve(seen, unexplained)
    evidence = -0.5 * (unexplained @ weighed + torch.logdet(seen)).item()
    end = (mean[-1] + total[-1, :-1] @ weighed).item()
    known = total[-1, :-1] @ torch.linalg.solve(seen, total[:-1, -1])
    deviation = math.sqrt(max((total[-1, -1] - known).item(), 0.0))
    fall = max((prior.a + spread[0] @ law[:-1].T @ weighed).item(), 0.0)  # a, by the losses
    return evidence, Forecast(
        *(math.exp(end + z * deviation) for z in (-QUANTILE, 0, QUANTILE)),
        *(math.exp(end + fall * (k**-EXPONENT - 1)) for k in (0.5, 2)),
    )


def used(points: Points, since: float) -> Points:
    """Those after ``since``, at most MOST_POINTS of them, evenly chosen; always the last."""
    late = [point for point in points if point[0] >= since]
    step = -(-len(late) // MOST_POINTS) or 1
    return late[::-1][::step][::-1]


def noise_of(y: Tensor) -> float:
    """Deviation of single values of a smooth curve, (K,), by how much neighbours zigzag."""
    if len(y) < 4:
        return 10 * LEAST_NOISE
    return max(LEAST_NOISE, y.diff(n=2).square().mean().div(6).sqrt().item())


def law_of(rate: Callable[[float], float], shares: Sequence[float]) -> list[tuple[float, float]]:
    """What a and b are multiplied by, at these shares of the run."""
    sums = [0.0]
    for step in range(STEPS):
        sums.append(sums[-1] + rate((step + 0.5) / STEPS))
    found = []
    for share in shares:
        done = sums[min(STEPS, max(1, round(share * STEPS)))] / sums[-1]
        found.append((done**-EXPONENT - 1, rate(share)))
    return found
