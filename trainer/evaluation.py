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
from trainer.run import LossOf, Run, next_token_loss
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
    total, total_bytes, by_language = [0.0] * (2 + len(run.measures)), 0, {}

    def named(sums: list[float], num_bytes: int) -> dict[str, float]:
        nats, num_labels, *others = sums
        if not run.measures:
            return {"heldout_bits_per_byte": bits_per_byte(nats, num_bytes)}
        means = (value / max(num_labels, 1) for value in others)
        return {f"heldout_{name}": mean for name, mean in zip(run.measures, means, strict=True)}

    for language, (batches, num_bytes) in held_out.items():
        with run.autocast:
            found = held_out_sums(run.model, unless(stopping, batches), run.loss_of, run.measures)
        total, total_bytes = [*map(sum, zip(total, found, strict=True))], total_bytes + num_bytes
        by_language |= {f"{k}_{language}": v for k, v in named(found, num_bytes).items()}
    scores = {}
    if held_out:
        nats, num_labels, *_ = total
        scores = {"heldout_loss": nats / max(num_labels, 1)}  # no labels if stopped immediately
        scores |= named(total, total_bytes)
    if len(held_out) > 1 and not run.measures:
        scores |= by_language
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


def held_out_sums(
    model: MiniMindForCausalLM,
    batches: Iterable[Any],
    loss_of: LossOf = next_token_loss,
    measures: tuple[str, ...] = (),
) -> list[float]:
    """Summed nats, number of labels and summed ``measures`` of batches from
    ``PretrainDataset.for_evaluation``; see ``Run``.

    Each rank passes its share of the batches; the sums are over all ranks, on every rank."""
    was_training, device = model.training, model.device
    sums, num_labels = torch.zeros(1 + len(measures), device=device), 0
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(device)
            out = loss_of(model, batch)
            means = [out.loss, *(getattr(out, name) for name in measures)]
            sums += torch.stack(means) * batch.num_labels
            num_labels += batch.num_labels
    model.train(was_training)
    nats, *others = sums.tolist()
    return distributed.totals(nats, num_labels, *others)
