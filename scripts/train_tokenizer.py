"""Train a byte-level BPE tokenizer on text or JSONL, and write it as a transformers tokenizer.

    python -m scripts.train_tokenizer --data_path corpus.jsonl notes.txt --output my_tokenizer

``--max_megabytes`` bounds memory: from a larger input, a uniform and repeatable sample is drawn.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.records import ENDINGS, DataError, read_documents

# The first ids are MiniMind's, because its later stages (chat, tools, thinking) rely on them.
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # padding, BOS, EOS
MEDIA_TOKENS = [
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    *("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"),
]
CHAT_TOKENS = [
    f"<{end}{name}>" for name in ("tool_call", "tool_response", "think") for end in ("", "/")
]
SPARE_TOKENS = [f"<|buffer{i}|>" for i in range(1, 10)]
MAX_TOKEN_BYTES = 24  # longer tokens are URLs and code of one corpus rather than words


def find_texts(paths: list[str]) -> list[Path]:
    """The given files, and in given folders those with a known file ending.

    Raises: DataError naming all files that are missing."""
    files: list[Path] = []
    for given in map(Path, paths):
        inside = [p for p in sorted(given.rglob("*")) if p.name.endswith(ENDINGS)]
        files += inside if given.is_dir() else [given]
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(f"--data_path {' '.join(missing or paths)}: no such file.")
    return files


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file in a known format, or the lines of any other file."""
    if path.name.endswith(ENDINGS):
        yield from (text for text, _ in read_documents(path))
    else:
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from lines


def sample_texts(files: list[Path], max_bytes: int, seed: int) -> Iterator[str]:
    """A uniform sample of the texts, about ``max_bytes`` in total; all of them if that is less."""
    share = max_bytes / max(1, sum(path.stat().st_size for path in files))
    choose = random.Random(seed)
    for path in files:
        yield from (text for text in read_texts(path) if share >= 1 or choose.random() < share)


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE: it can encode any text without unknown tokens, and splits digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL_TOKENS + MEDIA_TOKENS + CHAT_TOKENS + SPARE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained(folder)`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = json.loads(tokenizer.to_str())
    # Decoding with skip_special_tokens omits these, but not the marks of chat.
    hidden = {*CONTROL_TOKENS, *MEDIA_TOKENS}
    for token in rules["added_tokens"]:
        token["special"] = token["content"] in hidden
    pad, bos, eos = CONTROL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer.json", rules), ("tokenizer_config.json", settings)):
        part = folder / f".{name}.{os.getpid()}"
        part.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / name)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, 3 for bad data, 6 for input or output errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", nargs="+", required=True, help="JSONL, text, folders")
    parser.add_argument("--output", required=True, help="folder for the tokenizer's files")
    parser.add_argument(
        "--vocab_size", type=int, default=6400, help="tokens, including control tokens"
    )
    parser.add_argument(
        "--max_megabytes",
        type=int,
        default=64,
        help="maximum text to train on, in MB; needs about 65 times as much memory",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the sample")
    args = parser.parse_args(argv)
    least = len(CONTROL_TOKENS + MEDIA_TOKENS + CHAT_TOKENS + SPARE_TOKENS) + 256
    for name, smallest, largest in (("vocab_size", least, 10**6), ("max_megabytes", 1, 10**6)):
        if not smallest <= getattr(args, name) <= largest:
            found = getattr(args, name)
            parser.error(f"--{name} is {found}, expected {smallest:,} to {largest:,}")
    try:
        texts = sample_texts(find_texts(args.data_path), args.max_megabytes * 10**6, args.seed)
        tokenizer = train(texts, args.vocab_size)
        save(tokenizer, Path(args.output))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 6)
    print(f"{tokenizer.get_vocab_size():,} tokens written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
