"""How good the model is: loss on held-out documents, and continuations of fixed prompts."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.generation import GenerationError, generating_model
from model.model_minimind import MiniMindForCausalLM
from trainer import distributed
from trainer.console import log
from trainer.metrics import Metrics
from trainer.run import Run

T = TypeVar("T")
PROMPTS = ("The capital of France is", "中国的首都是", "Once upon a time", "水结成冰的温度是")
QUESTIONS = (  # for models that answer
    *("What is the capital of France?", "中国的首都是哪里？"),
    *("What colour is a banana?", "水在多少度结冰？"),
)


def evaluate(
    run: Run,
    held_out: Mapping[str, tuple[Iterable[Any], int]],
    tokenizer: PreTrainedTokenizerBase,
    metrics: Metrics,
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Report the loss on held-out batches, if any, and how the model continues fixed prompts.

    Args:
        held_out: batches and bytes of text, by language; scored separately and all together.
        stopping: called before each batch and the prompts; if true on any rank, none is reported.
    Returns: whether the evaluation was completed, the same on every rank."""
    scores, sums = {}, list[tuple[float, int, int]]()
    for language, (batches, num_bytes) in held_out.items():
        with run.autocast:
            nats, num_labels = held_out_nats(run.model, unless(stopping, batches))
        sums.append((nats, num_labels, num_bytes))
        scores[f"heldout_bits_per_byte_{language}"] = bits_per_byte(nats, num_bytes)
    if sums:
        nats, num_labels = sum(part[0] for part in sums), sum(part[1] for part in sums)
        num_bytes = sum(part[2] for part in sums)
        overall = {
            "heldout_loss": nats / max(num_labels, 1),  # no labels if stopped immediately
            "heldout_bits_per_byte": bits_per_byte(nats, num_bytes),
        }
        scores = overall | (scores if len(sums) > 1 else {})
    texts, repeated = {}, None
    if distributed.is_main_process() and run.can_generate and not stopping():
        try:
            texts, repeated = continuations(run.model, tokenizer, chat=run.args.program.is_chat)
        except GenerationError as error:
            run.can_generate = False
            log(f"warning: {error}. Training continues without samples.")
    if distributed.totals(stopping())[0]:
        return False
    run.latest |= scores
    run.progress.evaluated_step = run.step
    metrics.log_evaluation(scores, texts, repeated)
    return True


def bits_per_byte(nats: float, num_text_bytes: int) -> float:
    """Summed nats, including those of the end-of-document tokens, as bits per UTF-8 byte of text;
    comparable across tokenizers and row lengths."""
    return nats / math.log(2) / num_text_bytes


def unless(stopping: Callable[[], bool], items: Iterable[T]) -> Iterator[T]:
    """The items, until ``stopping()`` is true."""
    return itertools.takewhile(lambda _: not stopping(), items)


def held_out_nats(model: MiniMindForCausalLM, batches: Iterable[Any]) -> tuple[float, int]:
    """Summed nats and number of labels of batches from ``PretrainDataset.for_evaluation``.

    Each rank passes its share of the batches; the sums are over all ranks, on every rank."""
    was_training, device = model.training, model.device
    nats, num_labels = torch.zeros((), device=device), 0
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(device)
            out = model(**batch.model_inputs)
            nats += out.loss * batch.num_labels
            num_labels += batch.num_labels
    model.train(was_training)
    all_nats, all_labels = distributed.totals(nats.item(), num_labels)
    return all_nats, int(all_labels)


def continuations(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str] | None = None,
    max_new_tokens: int = 24,
    chat: bool = False,
) -> tuple[dict[str, str], float]:
    """Each prompt with its greedy continuation, or answer, so that evaluations can be compared;
    made in one batch, since a GPU takes as long for one prompt as for all.

    Returns: the texts by prompt, and how much they repeat, see ``repeated_ngrams``.
    Raises: GenerationError, see ``generating_model``."""
    prompts = [*(prompts or (QUESTIONS if chat else PROMPTS))]
    qwen, encode = generating_model(model), encode_question if chat else encode_prompt
    rows = [encode(tokenizer, prompt)[0] for prompt in prompts]
    longest = max(map(len, rows))

    def padded(rows: Iterable[Tensor], value: int) -> Tensor:
        """(number of rows, longest) int64, padded on the left."""
        padded = [F.pad(row, (longest - len(row), 0), value=value) for row in rows]
        return torch.stack(padded).to(model.device)

    out = qwen.generate(
        padded(rows, model.config.pad_token_id),
        attention_mask=padded(map(torch.ones_like, rows), 0),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    new = out[:, longest:]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    end = model.config.eos_token_id  # the rows of texts that ended are filled up after it
    written = [itertools.takewhile(lambda token: token != end, row) for row in new.tolist()]
    return dict(zip(prompts, texts, strict=True)), repeated_ngrams(map(list, written))


def repeated_ngrams(rows: Iterable[list[int]], n: int = 4) -> float:
    """Share of the rows' n-grams that their row had before: 0 if none repeats, near 1 in a loop.

    Source: seq-rep-n of Welleck et al. 2020, section 6.1, which averages it over rows; here short
    rows count less."""
    seen = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    total = sum(map(len, seen))
    return 1 - sum(len(set(ngrams)) for ngrams in seen) / total if total else 0.0


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """(1, T) int64: BOS and the prompt, the way documents begin in training."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return torch.tensor([[bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: str, before: Iterable[dict] = ()
) -> torch.Tensor:
    """(1, T) int64: the turns before, a user's question, and where its answer begins."""
    turns = [*before, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
