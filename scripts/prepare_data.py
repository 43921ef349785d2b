"""Tokenize a corpus ahead of its training, for instance on a cheaper machine.

    python -m scripts.prepare_data --data_path corpus.jsonl             # build the token cache
    python -m scripts.prepare_data --data_path corpus.jsonl --report    # and describe the corpus

Training with the same data, tokenizer and text column finds the cache and tokenizes nothing. What
the first record holds, a text, a conversation or a pair, decides which training that is.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.preferences import content_of
from dataset.records import ENDINGS, TEXT_COLUMN, find_files
from dataset.token_cache import DEFAULT_CACHE_DIR, TokenCache, build_token_cache
from trainer.program import run_program
from trainer.weights import load_tokenizer

NUM_SAMPLED = 5_000  # evenly spaced documents, from which the kinds of text are estimated
KINDS = ("Chinese", "English", "code")
PADDED_ROW = 340  # tokens, as in MiniMind's recipe
BOUNDS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of the histogram, in tokens
# Characters, the rare ones of extension A among them, and Chinese and full-width punctuation.
CHINESE_TEXT = re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf\u3000-\u303f\uff00-\uffef]+")
# A heuristic: lines of code begin or end in certain ways, or contain what prose does not.
CODE = re.compile(
    r"^\s*(?:[$#>]\s|//|/\*|\*/|@\w+\s*$|#include|#define|import |from \w[\w.]* import|def |class "
    r"|return\b|if\s*\(|for\s*\(|while\s*\(|else\b|public |private |static |const |let |var "
    r"|sudo |apt |yum |pip |git |docker |SELECT |INSERT |</?\w+[ >/])"
    r"|[;{}]\s*$|\)\s*:\s*$|=>|::|==|!=|&&|\|\||\w\(\)|\w\[\w+\]|(?:^|\s)[\w.]+\s*=\s*\S|\s--?\w"
    r"|(?:^|\s)(?:/[\w.-]+){2,}"
)


def report(cache: TokenCache, tokenizer: PreTrainedTokenizerBase) -> str:
    """A few lines on sizes, lengths, kinds of text, duplicates, and what padding would waste."""
    lengths = cache.offsets.diff()  # (num_documents,)
    num, num_tokens = len(lengths), int(lengths.sum())
    num_copies, copied_tokens = duplicates(cache)
    own_ends = cache.labels is not None  # a conversation has marks of its own
    padding, truncated = padded_waste(lengths if own_ends else lengths + 2)  # BOS and EOS
    return "\n".join(
        [
            f"documents   {num:,}; skipped: {cache.meta['num_empty']:,} without text, "
            f"{cache.meta['num_bad']:,} bad records",
            f"tokens      {num_tokens:,}{learned_or_text(cache)}",
            f"length      {num_tokens / num:,.0f} tokens on average, median "
            f"{int(lengths.median()):,}, maximum {int(lengths.max()):,}",
            *histogram(lengths),
            f"text        {shares_of_kinds(cache, tokenizer)}",
            f"duplicates  {num_copies:,} documents are exact copies of another, "
            f"{copied_tokens / num_tokens:.1%} of the tokens",
            f"padded      rows of {PADDED_ROW} with one document each would be {padding:.0%} "
            f"padding and lose {truncated:.0%} of the tokens; packed rows have no padding and lose "
            f"none",
        ]
    )


def learned_or_text(cache: TokenCache) -> str:
    """Of conversations, how much is learned; of texts, how long they are."""
    meta, num_bytes = cache.meta, int(cache.num_bytes.sum())
    if cache.labels is not None:
        return f", {meta['num_labels'] / meta['num_tokens']:.0%} of them learned"
    return (
        f" from {num_bytes:,} bytes, {num_bytes / meta['num_tokens']:.2f} bytes per token; "
        f"control tokens in the text: {meta['num_control_tokens']:,}"
    )


def histogram(lengths: Tensor) -> Iterator[str]:
    """One line per range of lengths: documents in it, their share, and a bar.

    Args: lengths: (num_documents,) int64, in tokens."""
    place = torch.bucketize(lengths, torch.tensor(BOUNDS))
    counts = torch.bincount(place, minlength=len(BOUNDS) + 1)
    for i, count in enumerate(counts.tolist()):
        name = f"to {BOUNDS[i]:,}" if i < len(BOUNDS) else "more"
        bar = "#" * round(30 * count / int(counts.max()))
        yield f"  {name:>8}  {count:>11,} {count / len(lengths):>6.1%} {bar}".rstrip()


def shares_of_kinds(cache: TokenCache, tokenizer: PreTrainedTokenizerBase) -> str:
    """The share of each kind of text in bytes, estimated from a sample of the documents."""
    num = len(cache.num_bytes)
    sampled = range(0, num, max(1, num // NUM_SAMPLED))
    sizes: Counter[str] = Counter()
    for document in sampled:
        sizes += kinds_of_text(cache.text(document, tokenizer))
    shares = ", ".join(f"{kind} {sizes[kind] / max(1, sizes.total()):.0%}" for kind in KINDS)
    of = f"of the bytes of {len(sampled):,} documents" if len(sampled) < num else "of the bytes"
    return f"{shares} {of} (estimated from characters and lines)"


def kinds_of_text(text: str) -> Counter[str]:
    """Bytes of Chinese text, of lines that look like code, and of all other text."""
    sizes: Counter[str] = Counter()
    for line in text.splitlines():
        size = len(line.encode())
        chinese = sum(len(part.encode()) for part in CHINESE_TEXT.findall(line))
        sizes["Chinese"] += chinese
        is_code = chinese * 4 < size and CODE.search(line) is not None
        sizes["code" if is_code else "English"] += size - chinese
    return sizes


def duplicates(cache: TokenCache) -> tuple[int, int]:
    """The number of documents that equal an earlier one, and of their tokens.

    The hash has 32 bits: documents that agree in hash and lengths are compared token by token."""
    lengths = cache.offsets.diff()
    keys = torch.stack((cache.hashes.long(), lengths, cache.num_bytes), 1)  # (num_documents, 3)
    _, group, sizes = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    candidates = torch.where(sizes[group] > 1)[0]
    candidates = candidates[group[candidates].argsort(stable=True)].tolist()
    num_copies = num_tokens = 0
    originals: list[Tensor] = []
    current = -1
    for document in candidates:
        if group[document] != current:
            originals, current = [], int(group[document])
        ids = cache.ids(document)
        if any(ids.equal(other) for other in originals):
            num_copies += 1
            num_tokens += len(ids)
        else:
            originals.append(ids)
    return num_copies, num_tokens


def padded_waste(lengths: Tensor) -> tuple[float, float]:
    """The shares of padding and of truncated tokens in rows of PADDED_ROW, one document each.

    Args: lengths: (num_documents,) int64, in tokens, with those that mark their ends."""
    num_kept = lengths.clamp(max=PADDED_ROW).sum().item()
    padding = 1 - num_kept / (len(lengths) * PADDED_ROW)
    return padding, 1 - num_kept / lengths.sum().item()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_path",
        nargs="+",
        required=True,
        help=f"files, folders, patterns: {', '.join(ENDINGS)}",
    )
    parser.add_argument(
        "--text_column",
        default=TEXT_COLUMN,
        help="the field of JSONL or column of parquet that holds the text",
    )
    parser.add_argument("--tokenizer_path", default="model", help="any transformers tokenizer")
    parser.add_argument("--cache_dir", default=DEFAULT_CACHE_DIR, help="folder of token caches")
    parser.add_argument(
        "--bad_records",
        choices=["stop", "skip"],
        default="stop",
        help="what to do with a record that cannot be read",
    )
    parser.add_argument(
        "--empty_thinking",
        type=float,
        default=1.0,
        help="of conversations: as in train_full_sft.py",
    )
    parser.add_argument("--report", action="store_true", help="also describe the corpus")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Build the cache that training with the same flags finds. Returns: the exit status."""
    args = build_parser().parse_args(argv)
    return run_program(lambda: prepare(args))


def prepare(args: argparse.Namespace) -> None:
    """The program. Raises: DataError, SettingsError, OSError."""
    since = time.monotonic()
    tokenizer = load_tokenizer(args.tokenizer_path)
    cache = build_token_cache(
        args.data_path,
        tokenizer,
        args.cache_dir,
        args.bad_records,
        args.text_column,
        content_of(find_files(args.data_path)[0], tokenizer, args.empty_thinking),
    )
    counts, seconds = cache.meta, time.monotonic() - since
    print(
        f"{cache.folder}: {counts['num_documents']:,} documents, {counts['num_tokens']:,} tokens, "
        f"{counts['num_bytes']:,} bytes of text, in {seconds:.1f} s"
    )
    if args.report:
        print(report(cache, tokenizer))


if __name__ == "__main__":
    sys.exit(main())
