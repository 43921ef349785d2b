"""An embedding and an output head that know, before the first update, which token follows which.

As layers begin as the identity, a new model is its embedding, the final norm and the head: it
predicts a token from the one before it alone. The best it can be at that is known without training,
from the counts of neighbouring tokens. It is a matrix of V x V; the model holds the best
approximation that its width allows.

V: vocabulary; D: width.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model.model_minimind import IGNORE, Block, MiniMindForCausalLM
from trainer import distributed
from trainer.console import log
from trainer.flags import AUTO

DISCOUNT = 0.75  # taken from each count, as usual for absolute discounting
EXPONENT = 0.25  # of a token's frequency, in the weight of its row or column
EMBEDDING_STD = 0.3125  # root mean square of an embedding's components
CLIPPED_SHARE = 0.02  # of tokens, whose vectors are too long and are shortened
MAX_TOKENS = 2**24  # counted in seconds; more tell little that updates would not, soon
ITERATIONS = 2  # of the approximate factorization
# Of heads that look back: how far, in turn; what their fastest pairs of channels contribute, so
# that the sum over pairs peaks at one distance; the weight of their norms, which makes it sharp.
DISTANCES = (1, 2, 1, 3)
PAIRS = (0.3, 0.25, 0.2, 0.1, 0.08, 0.07)
SHARPNESS = 1.5


def start_from_bigrams(model: MiniMindForCausalLM, batches: Iterable[Any]) -> Tensor | None:
    """Set embedding and head of a new model from the rows of these, the same on all ranks.

    Returns: the counts, as ``count_pairs``, on the main process."""
    counts: Tensor | None = None

    def work() -> tuple[Tensor, Tensor]:
        nonlocal counts
        counts = count_pairs(batches, model.config.vocab_size)
        log(
            f"embedding from {int(counts.values().sum()):,} pairs of neighbouring tokens, "
            f"{counts.values().numel():,} of them different"
        )
        return factors(counts, model.config.hidden_size)

    embedding, head = distributed.on_main_process(work)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
    return counts


def count_pairs(batches: Iterable[Any], vocab_size: int) -> Tensor:
    """How often a token (row) is followed by another (column), as a label that carries loss.

    Returns: (V, V) float32, sparse and coalesced; of about the first MAX_TOKENS."""
    counts = sparse(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), vocab_size)
    num_pairs = 0
    for batch in batches:
        pairs = torch.stack(pairs_of(batch))
        counts = (counts + sparse(pairs, torch.ones(pairs.shape[1]), vocab_size)).coalesce()
        num_pairs += pairs.shape[1]
        if num_pairs >= MAX_TOKENS:
            break
    return counts


def sparse(indices: Tensor, values: Tensor, size: int) -> Tensor:
    """(2, K) int64 and (K,) -> (size, size); values of equal indices are added up."""
    with torch.sparse.check_sparse_tensor_invariants():  # or else torch 2.11 warns
        return torch.sparse_coo_tensor(indices, values, (size, size)).coalesce()


def log_probabilities(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the smoothed probability of w after v, but for a term of v alone, in which
    softmax has no interest, as ``base[w] + bonus[v, w]``.

    The bonus is zero for pairs that never occurred: their probability is the share of w among what
    follows any token at all, each different token before it counted once.

    Args: counts: (V, V) sparse.
    Returns: (V,), (V, V) sparse.
    Source: interpolated Kneser-Ney smoothing (Chen and Goodman 1999, section 2.7)."""
    v, w = counts.indices()
    num_before = torch.bincount(w, minlength=len(counts)).float() + 0.5
    num_after = torch.bincount(v, minlength=len(counts)).float()
    base = num_before / num_before.sum()
    # p(w | v) = (C(v, w) - d) / C(v) + d n(v) / C(v) base(w); over the factor of base(w).
    bonus = torch.log1p((counts.values() - DISCOUNT) / (DISCOUNT * num_after[v] * base[w]))
    return base.log(), sparse(counts.indices(), bonus, len(counts))


def nats_of_pairs(counts: Tensor, batches: Iterable[Any]) -> float:
    """Summed nats of the labels in these, by the smoothed probabilities of pairs alone."""
    base, bonus = log_probabilities(counts)
    v = counts.indices()[0]
    num_after = torch.bincount(v, minlength=len(counts)).float()
    count = torch.bincount(v, counts.values(), minlength=len(counts))
    # The term of v; a token that nothing followed yet leaves all to the base.
    normalizer = torch.where(num_after > 0, (DISCOUNT * num_after / count).log(), 0.0)
    known, nats = bonus.indices()[0] * len(counts) + bonus.indices()[1], 0.0
    for batch in batches:
        tokens, nexts = pairs_of(batch)
        pair = tokens * len(counts) + nexts
        place = torch.searchsorted(known, pair).clamp(max=len(known) - 1)
        extra = torch.where(known[place] == pair, bonus.values()[place], 0.0)
        nats -= (base[nexts] + normalizer[tokens] + extra).sum(dtype=torch.float64).item()
    return nats


def pairs_of(batch: Any) -> tuple[Tensor, Tensor]:
    """(K,) and (K,) int64, on the host: the labels that carry loss, and the token before each."""
    tokens, nexts = batch.input_ids[:, :-1], batch.labels[:, 1:]
    carries = nexts != IGNORE
    return tokens[carries].cpu(), nexts[carries].cpu()


def factors(counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Embedding and head (V, D) whose product, after a norm of the embedding, is nearest to
    ``log_probabilities``; errors count by the tokens' frequencies.

    Two components serve other purposes: a constant, which the head multiplies by the base, and one
    that gives all embeddings the same length, since the norm would undo any other."""
    base, bonus = log_probabilities(counts)
    v, w = bonus.indices()
    frequency = torch.bincount(v, counts.values(), minlength=len(counts)).float() + 0.5
    row_weight, column_weight = frequency**EXPONENT, base.exp() ** EXPONENT
    weighted = sparse(
        bonus.indices(), bonus.values() * row_weight[v] * column_weight[w], len(counts)
    )
    rank = min(width - 2, len(counts))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        by_rows = weighted.to_sparse_csr()  # or the transpose is sorted for each product
        left, values, right = torch.svd_lowrank(by_rows, q=rank, niter=ITERATIONS)
    left = left * values.sqrt() / row_weight[:, None]
    right = right * values.sqrt() / column_weight[:, None]

    longest = left.norm(dim=1).quantile(1 - CLIPPED_SHARE).clamp(min=1e-3)
    left = left * (longest / left.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
    filling = (longest.square() - left.square().sum(1)).clamp(min=0).sqrt()
    length = longest * math.sqrt(2)  # of each row below
    embedding, head = torch.zeros(2, len(counts), width)
    embedding[:, 0], embedding[:, 1], embedding[:, 2 : 2 + rank] = longest, filling, left
    head[:, 0], head[:, 2 : 2 + rank] = base / longest, right
    norm = math.sqrt(width)  # the length of an embedding after the norm
    return embedding * (EMBEDDING_STD * norm / length), head * (length / norm)


@torch.no_grad()
def look_back(model: MiniMindForCausalLM, num_heads: int) -> None:
    """Let so many heads of the first layer, half of them with AUTO, begin by attending to the
    tokens one to three before.

    Their queries and keys begin as constants, made of the component that ``factors`` gives the same
    value in all embeddings, so that rotary embedding alone decides: a query
    that is turned back by some positions fits the key which is so many before it. Their outputs
    are zero at first, as all. A later layer can then ask what followed an earlier token, which
    takes much training to find otherwise (Olsson et al. 2022, induction heads)."""
    config, first = model.config, model.model.layers[0]
    if num_heads == AUTO:
        num_heads = config.num_attention_heads // 2
    if not num_heads:
        return
    assert isinstance(first, Block)
    attention = first.self_attn

    constant = math.sqrt(config.hidden_size / 2)  # what the norm makes of that component
    half = config.head_dim // 2
    share = torch.zeros(half)
    share[: len(PAIRS)] = torch.tensor(PAIRS)[:half]
    size = (share / share.sum() * config.head_dim).sqrt()
    speed = config.rope_theta ** (-torch.arange(half) / half)  # radians a position
    shared_by = config.num_attention_heads // config.num_key_value_heads
    for head in range(num_heads):
        angle = speed * DISTANCES[head % len(DISTANCES)]
        query = torch.cat((size * angle.cos(), -size * angle.sin()))
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        attention.q_proj.weight[rows, 0] = query.to(model.device) / constant
    key = torch.cat((size, torch.zeros(half))).to(model.device) / constant
    for group in range(-(-num_heads // shared_by)):
        rows = slice(group * config.head_dim, (group + 1) * config.head_dim)
        attention.k_proj.weight[rows, 0] = key
    attention.q_norm.weight.fill_(SHARPNESS)
    attention.k_norm.weight.fill_(SHARPNESS)
