"""--embedding_init bigrams: what a model predicts before its first update, and how runs keep it."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from dataset.lm_dataset import IGNORE, Batch, PretrainDataset
from model.model_minimind import MiniMindForCausalLM
from tests.helpers import shipped_tokenizer, tiny_config
from tests.running import (
    assert_same,
    newest_state,
    read_metrics,
    train_and_kill,
    train_in_process,
    train_on_ranks,
    write_corpus,
)
from trainer.bigrams import count_pairs, factors, look_back, nats_of_pairs, sparse
from trainer.command_line import parse_flags
from trainer.errors import SettingsError
from trainer.flags import AUTO

ON = {"embedding_init": "bigrams", "tie_word_embeddings": 0}


def kneser_ney(pairs: Counter, vocab_size: int, v: int, w: int) -> float:
    """The smoothed probability of w after v, as in the textbook."""
    before = Counter(second for _, second in pairs)
    followers = [count for (first, _), count in pairs.items() if first == v]
    share = (before[w] + 0.5) / (sum(before.values()) + 0.5 * vocab_size)
    if not followers:
        return share
    kept = max(pairs[v, w] - 0.75, 0) / sum(followers)
    return kept + 0.75 * len(followers) / sum(followers) * share


def test_a_wide_model_begins_with_the_smoothed_counts() -> None:
    """Its width leaves nothing out, but for the longest of the vectors, which is shortened."""
    vocab_size = 24
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.rand(2, 600, generator=generator) ** 2 * (vocab_size - 2)).long()
    pairs = Counter(zip(*drawn.tolist(), strict=True))
    embedding, head = factors(sparse(drawn, torch.ones(600), vocab_size), 32)
    model = MiniMindForCausalLM(tiny_config(vocab_size=vocab_size, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
        found = model(torch.arange(vocab_size)[:, None]).logits[:, 0].softmax(-1)
    expected = torch.tensor(
        [[kneser_ney(pairs, vocab_size, v, w) for w in range(vocab_size)] for v in range(24)]
    )
    torch.testing.assert_close(expected.sum(1), torch.ones(24))
    errors = (found / expected).log().abs().amax(1).sort().values
    assert errors[:-1].max() < 0.01 and errors[-1] < 1, errors
    lengths = embedding.norm(dim=1)
    torch.testing.assert_close(lengths, lengths.mean().expand_as(lengths))


def test_a_narrow_model_is_nearer_to_them_than_to_shares_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    first = torch.randint(0, 60, (20_000,), generator=generator)
    second = (first * 7 + torch.randint(0, 6, (20_000,), generator=generator)) % 60
    losses = []
    for width in (2, 8, 16, 32):  # two components hold no pairs
        embedding, head = factors(
            sparse(torch.stack((first, second)), torch.ones(20_000), 60), width
        )
        logits = embedding / embedding.norm(dim=1, keepdim=True) * math.sqrt(width) @ head.T
        losses.append(torch.nn.functional.cross_entropy(logits[first], second).item())
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(60), abs=0.05)
    assert losses[-1] < math.log(6) + 0.6


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_are_those_that_carry_loss(tmp_path: Path, packing: bool) -> None:
    """Not from one document into the next, and none that padding or a cut leaves out."""
    corpus, row_length = write_corpus(tmp_path / "corpus.jsonl"), 16
    data = PretrainDataset(
        [str(corpus)],
        shipped_tokenizer(),
        row_length,
        packing=packing,
        heldout_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )
    stream, expected = [], Counter()
    for document in data.order.tolist():
        begin, end = data.cache.offsets[document : document + 2].tolist()
        ids = [data.bos, *data.cache.tokens[begin:end].tolist(), data.eos]
        stream += [(token, nth) for nth, token in enumerate(ids)][: None if packing else row_length]
    for place in range(1, len(stream)):
        (before, _), (token, nth) = stream[place - 1 : place + 1]
        if nth and not (packing and place % row_length == 0):
            expected[before, token] += 1
    counts = count_pairs(map(data.__getitems__, [[0, 1, 2], range(3, len(data))]), 6400)
    found = zip(*counts.indices().tolist(), counts.values().tolist(), strict=True)
    assert {(v, w): count for v, w, count in found} == expected
    assert sum(expected.values()) == sum(data[i][1][1:].ne(-100).sum() for i in range(len(data)))


def first_loss(folder: Path) -> float:
    """The first training loss that the run logged."""
    return next(record["loss"] for record in read_metrics(folder) if "loss" in record)


def test_a_run_begins_far_below_chance_and_resumes_to_the_last_bit(tmp_path: Path) -> None:
    log = train_in_process(tmp_path / "whole", **ON)
    assert "pairs of neighbouring tokens" in log
    assert first_loss(tmp_path / "whole") < 0.75 * math.log(6400)
    train_and_kill(tmp_path / "cut", 7, **ON)
    assert "neighbouring" not in train_in_process(tmp_path / "cut", **ON, from_resume=1)
    assert_same(newest_state(tmp_path / "cut"), newest_state(tmp_path / "whole"))


def test_two_ranks_begin_with_the_same(tmp_path: Path) -> None:
    train_in_process(tmp_path / "one", **ON, batch_size=4, epochs=1)
    train_on_ranks(tmp_path / "two", 2, **ON, epochs=1)
    one, two = (first_loss(tmp_path / name) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("words", ["", "--tie_word_embeddings 0 --from_weight pretrain"])
def test_a_model_that_cannot_begin_so_is_refused(words: str) -> None:
    with pytest.raises(SettingsError, match="--tie_word_embeddings 0 and no --from_weight"):
        parse_flags(["--embedding_init", "bigrams", *words.split()])


def test_heads_begin_by_looking_back_as_far_as_they_should() -> None:
    """Whatever the tokens are; computed here from the projections, position by position."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MiniMindForCausalLM(tiny_config(**sizes, tie_word_embeddings=False))
    counts = sparse(torch.randint(0, 96, (2, 5000)), torch.ones(5000), 96)
    embedding, head = factors(counts, 64)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    look_back(model, 3)
    attention, length, size = model.model.layers[0].self_attn, 48, 16
    x = model.model.layers[0].input_layernorm(embedding[torch.randint(0, 96, (length,))])
    with torch.no_grad():
        q = attention.q_norm(attention.q_proj(x).view(length, 4, size))
        k = attention.k_norm(attention.k_proj(x).view(length, 2, size))
    theta = model.config.rope_theta ** (-torch.arange(8) / 8)
    turn = torch.polar(torch.ones(length, 8), torch.arange(length)[:, None] * theta)[:, None]
    q, k = (torch.complex(t[..., :8], t[..., 8:]) * turn for t in (q, k))
    for h, distance in enumerate((1, 2, 1)):
        scores = (q[:, h] @ k[:, h // 2].conj().T).real / math.sqrt(size)
        shares = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -math.inf).softmax(-1)
        looked = [shares.diagonal(-back)[8:].mean().item() for back in range(5)]
        assert max(range(5), key=looked.__getitem__) == distance and looked[distance] > 0.3, looked
    changed = {n for n, p in model.named_parameters() if not p.equal(before[n])}
    assert {n.split("self_attn.")[1] for n in changed} == {
        f"{part}.weight" for part in ("q_proj", "k_proj", "q_norm", "k_norm")
    }
    assert all(n.startswith("model.layers.0.") for n in changed)


def test_auto_is_half_of_the_heads_however_many_there_are() -> None:
    """So `--recipe best` fits any model."""
    for heads in (1, 2, 6):
        sizes = {"hidden_size": 96, "num_attention_heads": heads, "num_key_value_heads": 1}
        torch.manual_seed(5)
        model = MiniMindForCausalLM(tiny_config(**sizes, tie_word_embeddings=False))
        query = model.model.layers[0].self_attn.q_proj.weight
        before = query.detach().clone()
        look_back(model, AUTO)
        changed = (query != before).any(1).view(heads, -1)
        assert changed.any(1).tolist() == [head < heads // 2 for head in range(heads)]
        parse_flags(f"--recipe best --num_attention_heads {heads}".split())


@pytest.mark.parametrize("words", ["--look_back_heads 2", "--recipe best --look_back_heads 9"])
def test_more_heads_than_there_are_or_none_to_go_with_are_refused(words: str) -> None:
    with pytest.raises(SettingsError, match=r"--look_back_heads is \d, expected at most 8"):
        parse_flags(words.split())
    with pytest.raises(SettingsError, match=r"--look_back_heads is auto, .* or 0"):
        parse_flags(["--recipe", "best", "--embedding_init", "random"])


def test_nats_of_pairs_are_those_of_the_textbook() -> None:
    """Also of pairs that never occurred, and after a token that was never seen."""
    vocab_size = 12
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, (6, 20), generator=generator)
    counted = Batch(ids, ids, None, ids.numel())
    counts = count_pairs([counted], vocab_size)
    pairs = Counter(zip(ids[:, :-1].flatten().tolist(), ids[:, 1:].flatten().tolist(), strict=True))

    other = torch.randint(vocab_size, (3, 9), generator=generator)
    labels = other.clone()
    labels[0, 4] = labels[2, :5] = IGNORE
    expected = 0.0
    for row, wanted in zip(other.tolist(), labels.tolist(), strict=True):
        for v, w in zip(row, wanted[1:], strict=False):
            if w != IGNORE:
                expected -= math.log(kneser_ney(pairs, vocab_size, v, w))
    found = nats_of_pairs(counts, [Batch(other, labels, None, 0)])
    assert found == pytest.approx(expected, rel=1e-5)
