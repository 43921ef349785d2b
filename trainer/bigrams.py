"""An embedding and an output head that know, before the first update, which token follows which.

As layers begin as the identity, a new model is its embedding, the final norm and the head: it
predicts a token from the one before it alone. What it can learn about that is in the counts of
neighbouring tokens, a matrix of V x V, so it is fitted to those first: each step sees all that ever
followed a thousand tokens, where an update of the run sees a thousand pairs.

V: vocabulary; D: width; R: tokens in a step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model.model_minimind import IGNORE, Block, MiniMindForCausalLM
from trainer import distributed
from trainer.console import log

DISCOUNT = 0.75  # taken from each count, as usual for absolute discounting
MAX_TOKENS = 2**24  # counted in seconds; more tell little that updates would not, soon
# Of the fit; measured in docs/RECIPES.md.
NUM_STEPS, TOKENS_PER_STEP, STABLE_SHARE = 80, 1024, 0.4
EMBEDDING_LR, HEAD_LR, BETAS = 0.02, 0.007, (0.8, 0.99)
RARENESS = 0.75  # exponent of a token's frequency in how often it is drawn
EMBEDDING_STD = 0.3125  # root mean square of an embedding's components in the end
# Of heads that look back: how far, in turn; what their fastest pairs of channels contribute, so
# that the sum over pairs peaks at one distance; the weight of their norms, which makes it sharp.
DISTANCES = (1, 2, 1, 3)
PAIRS = (0.3, 0.25, 0.2, 0.1, 0.08, 0.07)
SHARPNESS = 1.5


def start_from_bigrams(model: MiniMindForCausalLM, batches: Iterable[Any]) -> None:
    """Fit embedding and head of a new model to the rows of these, the same on all ranks."""

    def work() -> tuple[Tensor, Tensor]:
        counts = count_pairs(batches, model.config.vocab_size)
        log(
            f"embedding from {int(counts.values().sum()):,} pairs of neighbouring tokens, "
            f"{counts.values().numel():,} of them different"
        )
        embedding, head = fit(counts, model.config.hidden_size, model.device)
        return embedding.cpu(), head.cpu()

    embedding, head = distributed.on_main_process(work)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)


def count_pairs(batches: Iterable[Any], vocab_size: int) -> Tensor:
    """How often a token (row) is followed by another (column), as a label that carries loss.

    Returns: (V, V) float32, sparse and coalesced; of about the first MAX_TOKENS."""
    counts = sparse(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), vocab_size)
    num_pairs = 0
    for batch in batches:
        tokens, nexts = batch.input_ids[:, :-1], batch.labels[:, 1:]
        carries = nexts != IGNORE
        pairs = torch.stack((tokens[carries], nexts[carries])).cpu()
        counts = (counts + sparse(pairs, torch.ones(pairs.shape[1]), vocab_size)).coalesce()
        num_pairs += pairs.shape[1]
        if num_pairs >= MAX_TOKENS:
            break
    return counts


def sparse(indices: Tensor, values: Tensor, size: int) -> Tensor:
    """(2, K) int64 and (K,) -> (size, size); values of equal indices are added up."""
    shape = (size, size)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()


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


def fit(counts: Tensor, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embedding and head, (V, D) each, whose product after a norm of the embedding is close to
    ``log_probabilities``, by the cross-entropy of what follows tokens as frequent as they are.

    The first component is a constant at first, which the head multiplies by the base; the others
    are small, so that a token that is never drawn predicts what is probable anyway."""
    base, bonus = log_probabilities(counts)
    vocab_size = len(counts)
    embedding = 0.05 * torch.randn(vocab_size, width)
    embedding[:, 0] = 1.25
    head = torch.zeros(vocab_size, width)
    head[:, 0] = base / normed(embedding)[:, 0].mean()
    embedding, head, base = (t.to(device) for t in (embedding, head, base))

    frequency = torch.bincount(counts.indices()[0], counts.values(), minlength=vocab_size)
    frequency = (frequency / frequency.sum()).float()
    drawn = frequency**RARENESS / (frequency**RARENESS).sum()
    groups = [
        {"params": [embedding.requires_grad_()], "peak": EMBEDDING_LR},
        {"params": [head.requires_grad_()], "peak": HEAD_LR},
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            left = (1 - step / NUM_STEPS) / (1 - STABLE_SHARE)
            group["lr"] = group["peak"] * min(1.0, left)
        tokens, times = torch.multinomial(drawn, TOKENS_PER_STEP, replacement=True).unique(
            return_counts=True
        )
        weights = (times * frequency[tokens] / drawn[tokens]).to(device)  # each as in the text
        target = (base + bonus.index_select(0, tokens).to_dense().to(device)).softmax(-1)
        logits = normed(embedding[tokens.to(device)]) @ head.T  # (R, V)
        losses = logits.logsumexp(-1) - (target * logits).sum(-1)
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        optimizer.step()
    return normed(embedding.detach()) * EMBEDDING_STD, head.detach()


def normed(x: Tensor) -> Tensor:
    """(K, D), as the final norm begins."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


@torch.no_grad()
def look_back(model: MiniMindForCausalLM, num_heads: int) -> None:
    """Let so many heads of the first layer begin by attending to the tokens one to three before.

    Queries and keys there begin as constants, so that rotary embedding alone decides: a query
    that is turned back by some positions fits the key which is so many before it. Their outputs
    are zero at first, as all. A later layer can then ask what followed an earlier token, which
    takes much training to find otherwise (Olsson et al. 2022, induction heads)."""
    if not num_heads:
        return
    config, first = model.config, model.model.layers[0]
    assert isinstance(first, Block)
    attention = first.self_attn

    table = normed(model.model.embed_tokens.weight)
    common = table.mean(0)  # (D,): every token has much of it, as embeddings began with a constant
    common = common / common.square().sum()
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
        attention.q_proj.weight[rows] += torch.outer(query.to(common), common)
    key = torch.cat((size, torch.zeros(half))).to(common)
    for group in range(-(-num_heads // shared_by)):
        rows = slice(group * config.head_dim, (group + 1) * config.head_dim)
        attention.k_proj.weight[rows] += torch.outer(key, common)
    attention.q_norm.weight.fill_(SHARPNESS)
    attention.k_norm.weight.fill_(SHARPNESS)
