"""Continue prompts with a pretrained model, talk with a fine-tuned one, or measure its loss.

python eval_llm.py                                      # built-in prompts
python eval_llm.py --prompt "The capital of France is"  # your own; repeat --prompt for more
python eval_llm.py --interactive 1                      # read prompts from the terminal
python eval_llm.py --weight full_sft --interactive 1    # a conversation
python eval_llm.py --data_path held_out.jsonl           # nats per token, bits per byte
"""

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from dataset.chat_datasets import SFTDataset
from dataset.conversations import holds_conversations
from dataset.lm_dataset import PretrainDataset, SkipBatchSampler
from dataset.records import find_files
from dataset.token_cache import DEFAULT_CACHE_DIR
from model.generation import generating_model
from model.model_minimind import MiniMindForCausalLM
from trainer.command_line import Parser, add_flags, range_problems
from trainer.device import default_device, device_problems, setup_seed
from trainer.errors import CheckpointError, SettingsError, printable
from trainer.evaluation import bits_per_byte, held_out_sums
from trainer.flags import MOST_ROWS, flag
from trainer.program import run_program
from trainer.reading import read_json
from trainer.samples import encode_prompt, encode_question
from trainer.weights import load_tokenizer, load_weights, read_config, read_weights

# Prompts and their answers: facts that the bundled sample states, though never in these words.
PROMPTS = {
    "The capital of France is": "Paris",
    "Paris is the capital of": "France",
    "What is the capital of France?": "Paris",
    "What colour is a banana?": "yellow",
    "The Sun rises in": "east",
    "中国的首都是": "北京",
    "法国的首都是": "巴黎",
    "水结成冰的温度是": "零摄氏度",
    "《西游记》的作者是": "吴承恩",
    "香蕉是什么颜色的？": "黄色",
}
# The same for models that answer.
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What colour is a banana?": "yellow",
    "Where does the Sun rise?": "east",
    "Who wrote Hamlet?": "Shakespeare",
    "中国的首都是哪里？": "北京",
    "法国的首都叫什么？": "巴黎",
    "水在多少度结冰？": "零摄氏度",
    "谁写了《西游记》？": "吴承恩",
    "香蕉是什么颜色的？": "黄色",
}
TEMPERATURE = 0.5  # docs/LOG.md, 2026-11-24, compares the answers at other temperatures


def add_weight_flags(parser: Parser) -> argparse._ArgumentGroup:
    """Add the flags that select a model, also to the parsers of scripts. Returns: their group."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--weight", default="pretrain", help="name of the weights in --save_dir, or a .pth file")
    add("--save_dir", default="out", help="folder of the weights")
    add("--hidden_size", type=int, help="needed if --save_dir has several sizes of that name")
    add("--use_moe", type=int, choices=[0, 1], help="1: with experts; needed if there are both")
    add("--tokenizer_path", default="model", help="the tokenizer that the model was trained with")
    add(
        "--chat",
        type=int,
        choices=[0, 1],
        help="1: a model that answers; default: as its .json says, or else by its name",
    )
    parser.set_defaults(inference_rope_scaling=False, device="cpu")
    return group


@dataclass
class MeasuringFlags:
    """measuring the loss of files"""

    data_path: list[str] | None = flag(  # noqa: RUF009
        None, "files to measure the loss on instead"
    )
    text_column: str = flag("text", "with --data_path: the field that holds the text")
    max_seq_len: int = flag(512, "with --data_path: tokens per row", least=2, most=32768)
    batch_size: int = flag(16, "with --data_path: rows per forward pass", least=1, most=MOST_ROWS)
    bad_records: str = flag(
        "stop",
        "with --data_path: what to do with a record that cannot be read",
        choices=["stop", "skip"],
    )
    cache_dir: str = flag(DEFAULT_CACHE_DIR, "with --data_path: folder of token caches")


@dataclass
class SamplingFlags:
    """sampling"""

    history: int = flag(
        8,
        "with --interactive and a model that answers: how many turns of both it sees again",
        alias="historys",
        least=0,
    )
    max_new_tokens: int = flag(100, "maximum length of a continuation", least=1, most=10**6)
    temperature: float = flag(TEMPERATURE, "0: always the most probable token", least=0)
    top_p: float = flag(
        0.9,
        "sample from the most probable tokens with this much probability together",
        above=0,
        most=1,
    )
    top_k: int = flag(50, "sample from this many tokens at most; 0: all", least=0)
    repetition_penalty: float = flag(1.0, "above 1: fewer repetitions", least=0.01, most=100)
    seed: int = flag(42, "the same seed gives the same text")


def build_parser() -> Parser:
    """The parser of all flags; ``check_flags`` checks their values."""
    parser = Parser(__doc__)
    add = add_weight_flags(parser).add_argument
    add("--inference_rope_scaling", action="store_true", help="extend the context 16 times (YaRN)")
    add("--device", default=default_device(), help="cuda, mps or cpu")
    add = parser.add_argument_group("what to do").add_argument
    add("--prompt", action="append", help="text to continue; may be given several times")
    add("--interactive", type=int, default=0, choices=[0, 1], help="1: read prompts, one per line")
    add_flags(parser, (MeasuringFlags, SamplingFlags))
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises: SettingsError listing every flag that is out of range."""
    problems = [*range_problems(args, MeasuringFlags, SamplingFlags)]
    if args.history % 2:
        problems.append(f"--history is {args.history}, expected an even number: both sides' turns")
    if args.inference_rope_scaling and args.data_path:
        problems.append(
            "--inference_rope_scaling applies to prompts only; --data_path measures "
            "the model at the positions it was trained on"
        )
    problems += device_problems(args.device)
    if problems:
        raise SettingsError("; ".join(problems) + ".")


def find_weights(args: argparse.Namespace) -> Path:
    """The file that --weight selects. Raises: CheckpointError unless there is exactly one."""
    if args.weight.endswith(".pth"):
        return Path(args.weight)
    pattern = re.compile(re.escape(args.weight) + r"_(\d+)(_moe)?\.pth")
    found = [
        (path, m)
        for path in Path(args.save_dir).glob("*.pth")
        if (m := pattern.fullmatch(path.name))
    ]
    fitting = sorted(
        path
        for path, m in found
        if args.hidden_size in (None, int(m[1])) and args.use_moe in (None, int(bool(m[2])))
    )
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(path.name for path in (fitting or sorted(p for p, _ in found))) or "none"
    expected = "several; choose with --hidden_size and --use_moe" if fitting else "no weights"
    raise CheckpointError(
        f"--weight {args.weight}: {expected} of that name and size in {args.save_dir} "
        f"(found: {names}). Train them first, or give a .pth file."
    )


def is_chat(args: argparse.Namespace) -> bool:
    """Whether the weights answer questions rather than continue text: by --chat, by the description
    of the run beside them, or as MiniMind does by their name."""
    if args.chat is not None:
        return bool(args.chat)
    path = find_weights(args)
    try:
        return "program" in read_json(path.with_suffix(".json"))["run"]["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        return "pretrain" not in path.name


def load_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> MiniMindForCausalLM:
    """The model that --weight selects, in evaluation mode, on --device.

    Raises: CheckpointError, SettingsError if the tokenizer does not fit it."""
    path = find_weights(args)
    config = read_config(path, read_weights(path))
    if len(tokenizer) > config.vocab_size:
        raise SettingsError(
            f"--tokenizer_path {args.tokenizer_path} has {len(tokenizer):,} entries, but the "
            f"vocabulary of {path} has {config.vocab_size:,}. Give the one it was trained with."
        )
    config.inference_rope_scaling = args.inference_rope_scaling
    try:
        model = MiniMindForCausalLM(config)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = printable(str(error).split("\n")[0])
        raise CheckpointError(f"{path} describes an impossible model: {reason:.160}") from None
    load_weights(model, path, flag=f"--weight {args.weight}")
    return model.eval().to(args.device)


def measure(
    args: argparse.Namespace, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print the model's loss on all documents of --data_path, and bits per byte by language; of
    conversations, on what the assistant says."""
    choice = {"cache_dir": args.cache_dir, "bad_records": args.bad_records}
    if holds_conversations(find_files(args.data_path)[0]):
        data = SFTDataset(args.data_path, tokenizer, args.max_seq_len, **choice)
    else:
        choice["text_column"] = args.text_column
        data = PretrainDataset(args.data_path, tokenizer, args.max_seq_len, **choice)
    nats, num_labels, num_bytes, by_language = 0.0, 0.0, 0, []
    for language, part in data.by_language(tokenizer).items():
        batches = map(part.__getitems__, SkipBatchSampler(range(len(part)), args.batch_size))
        part_nats, part_labels = held_out_sums(model, batches)
        nats, num_labels = nats + part_nats, num_labels + part_labels
        num_bytes += part.num_text_bytes
        by_language.append(f"{language} {bits_per_byte(part_nats, part.num_text_bytes):.4f}")
    print(
        f"{len(data.documents):,} documents, {num_bytes:,} bytes: loss {nats / num_labels:.4f} "
        f"nats/token, {bits_per_byte(nats, num_bytes):.4f} bits/byte ({', '.join(by_language)}), "
        f"rows of {args.max_seq_len} tokens"
    )


def typed_prompts() -> Iterator[str]:
    """Prompts from the terminal, until an empty line or the end of input."""
    with contextlib.suppress(EOFError):
        while prompt := input("prompt: "):
            yield prompt


def sampling(temperature: float, top_p: float, top_k: int = 50) -> dict:
    """Arguments of ``generate`` for sampling; a temperature of 0 means greedy decoding, as does
    one by which scores would overflow."""
    if temperature < 1e-5:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def continue_prompts(
    args: argparse.Namespace,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    chat: bool = False,
) -> None:
    """Print each prompt and its continuation, or answer, while it is generated.

    Raises: GenerationError."""
    qwen = generating_model(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns: list[dict] = []  # of an interactive conversation
    for prompt in prompts:
        setup_seed(args.seed)  # each time, so that texts do not depend on earlier prompts
        if chat:
            seen = turns[-args.history :] if args.history else []
            ids = encode_question(tokenizer, prompt, seen).to(args.device)
        else:
            ids = encode_prompt(tokenizer, prompt).to(args.device)
        if not args.interactive or not chat:
            print(prompt, end="\n" if chat else "", flush=True)
        start = time.monotonic()
        out = qwen.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            repetition_penalty=args.repetition_penalty,
            streamer=streamer,
            **sampling(args.temperature, args.top_p, args.top_k),
        )
        seconds = time.monotonic() - start
        print(f"[{(out.shape[1] - ids.shape[1]) / seconds:.0f} tokens/s]\n")
        if args.interactive:
            answer = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
            turns.append({"role": "user", "content": prompt})
            turns.append({"role": "assistant", "content": answer.removesuffix("\n")})


def evaluate(argv: list[str] | None) -> None:
    """The program: measure files, or continue prompts."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = load_model(args, tokenizer)
    if args.data_path:
        measure(args, model, tokenizer)
    else:
        chat = is_chat(args)
        if chat and not tokenizer.chat_template:
            raise SettingsError(
                f"--tokenizer_path {args.tokenizer_path}: the tokenizer has no chat template, "
                f"which a model that answers needs. Give the one that it was fine-tuned with."
            )
        built_in = QUESTIONS if chat else PROMPTS
        prompts = typed_prompts() if args.interactive else args.prompt or built_in
        continue_prompts(args, model, tokenizer, prompts, chat)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, else see trainer/errors.py."""
    return run_program(lambda: evaluate(argv))


if __name__ == "__main__":
    sys.exit(main())
