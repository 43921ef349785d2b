"""How good the model is: its loss on held-out documents."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from model.generation import GenerationError
from model.model_minimind import MiniMindForCausalLM
from trainer import distributed
from trainer.console import log
from trainer.metrics import Metrics
from trainer.run import Run
from trainer.samples import continuations

T = TypeVar("T")


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
