"""What a corpus is made of, from its token cache: python -m dataset.token_cache --report"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SAMPLED = 5_000  # documents that are read for the shares of languages, at equal distances
KINDS = ("Chinese", "English", "code")
PADDED_ROW = 340  # of MiniMind's recipe
BOUNDS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of the histogram, in tokens
CHINESE = re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf\u3000-\u303f\uff00-\uffef]+")
# A line is taken for code by how it begins or ends, or by what prose has not: a rule of thumb.
CODE = re.compile(
    r"^\s*(?:[$#>]\s|//|/\*|\*/|@\w+\s*$|#include|#define|import |from \w[\w.]* import|def |class "
    r"|return\b|if\s*\(|for\s*\(|while\s*\(|else\b|public |private |static |const |let |var "
    r"|sudo |apt |yum |pip |git |docker |SELECT |INSERT |</?\w+[ >/])"
    r"|[;{}]\s*$|\)\s*:\s*$|=>|::|==|!=|&&|\|\||\w\(\)|\w\[\w+\]|(?:^|\s)[\w.]+\s*=\s*\S|\s--?\w"
    r"|(?:^|\s)(?:/[\w.-]+){2,}"
)


class Corpus(Protocol):
    """TokenCache, as far as it is read here."""

    meta: dict[str, Any]
    tokens: Tensor
    offsets: Tensor
    num_bytes: Tensor
    hashes: Tensor

    def ids(self, document: int) -> Tensor: ...


def report(cache: Corpus, tokenizer: PreTrainedTokenizerBase) -> str:
    """A few lines of text: sizes, lengths, kinds of text, duplicates, what padding would waste."""
    lengths = cache.offsets.diff()  # (num_documents,)
    num, num_tokens = len(lengths), int(lengths.sum())
    num_bytes = int(cache.num_bytes.sum())
    lines = [
        f"documents   {num:,}; empty ones left out: {cache.meta['num_empty']:,}, bad records: "
        f"{cache.meta['num_bad']:,}",
        f"tokens      {num_tokens:,} of {num_bytes:,} bytes: {num_bytes / num_tokens:.2f} bytes a "
        f"token; control tokens in the text: {cache.meta['num_control_tokens']:,}",
        f"length      {num_tokens / num:,.0f} tokens a document; half have at most "
        f"{int(lengths.median()):,}, the longest {int(lengths.max()):,}",
        *histogram(lengths),
    ]
    read = range(0, num, max(1, num // SAMPLED))
    sizes = Counter()
    for text in texts(cache, tokenizer, read):
        sizes += kinds_of_text(text)
    of = f"of {len(read):,} documents' bytes" if len(read) < num else "of the bytes"
    whole = max(1, sizes.total())
    parts = ", ".join(f"{kind} {sizes[kind] / whole:.0%}" for kind in KINDS)
    lines.append(f"text        {parts} {of} (by characters and lines: a rule of thumb)")
    copies, tokens = duplicates(cache)
    lines.append(f"duplicates  {copies:,} documents are exact copies of another, "
                 f"{tokens / num_tokens:.1%} of the tokens")
    padding, cut = padded_waste(lengths)
    lines.append(f"padded      rows of {PADDED_ROW}, one document each, would be {padding:.0%} "
                 f"padding and never show {cut:.0%} of the tokens; packed rows: none of both")
    return "\n".join(lines)


def histogram(lengths: Tensor) -> Iterator[str]:
    """How many documents are how long; a bar is the share of the most frequent length."""
    place = torch.bucketize(lengths, torch.tensor(BOUNDS))
    counts = torch.bincount(place, minlength=len(BOUNDS) + 1)
    for i, count in enumerate(counts.tolist()):
        name = f"to {BOUNDS[i]:,}" if i < len(BOUNDS) else "more"
        bar = "#" * round(30 * count / int(counts.max()))
        yield f"  {name:>8}  {count:>11,} {count / len(lengths):>6.1%} {bar}".rstrip()


def texts(cache: Corpus, tokenizer: PreTrainedTokenizerBase, read: range) -> Iterator[str]:
    """Some documents."""
    for i in read:
        yield tokenizer.decode(cache.ids(i))


def kinds_of_text(text: str) -> Counter:
    """Bytes of Chinese characters, of lines that look like code, and of all other text."""
    sizes: Counter = Counter()
    for line in text.splitlines():
        size = len(line.encode())
        chinese = sum(len(part.encode()) for part in CHINESE.findall(line))
        sizes["Chinese"] += chinese
        is_code = chinese * 4 < size and CODE.search(line) is not None
        sizes["code" if is_code else "English"] += size - chinese
    return sizes


def duplicates(cache: Corpus) -> tuple[int, int]:
    """Documents that are equal to an earlier one, and their tokens.

    The hash has 32 bits: those that agree in it and in length are compared token by token."""
    lengths = cache.offsets.diff()
    keys = torch.stack((cache.hashes.long(), lengths, cache.num_bytes), 1)
    _, group, sizes = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    candidates = torch.where(sizes[group] > 1)[0]
    candidates = candidates[group[candidates].argsort(stable=True)].tolist()
    copies = tokens = 0
    originals: list[Tensor] = []
    current = -1
    for i in candidates:
        if group[i] != current:
            originals, current = [], int(group[i])
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]]
        if any(ids.equal(other) for other in originals):
            copies += 1
            tokens += len(ids)
        else:
            originals.append(ids)
    return copies, tokens


def padded_waste(lengths: Tensor) -> tuple[float, float]:
    """The share of padding in rows of one document each, and of tokens that are cut off."""
    with_ends = lengths + 2  # BOS and EOS
    shown = with_ends.clamp(max=PADDED_ROW)
    padding = 1 - shown.sum().item() / (len(lengths) * PADDED_ROW)
    return padding, 1 - shown.sum().item() / with_ends.sum().item()
