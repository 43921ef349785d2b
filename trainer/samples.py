"""How a model continues fixed prompts or answers fixed questions, and how much it repeats."""

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.generation import generating_model
from model.model_minimind import MiniMindForCausalLM

PROMPTS = ("The capital of France is", "中国的首都是", "Once upon a time", "水结成冰的温度是")
QUESTIONS = (  # for models that answer
    *("What is the capital of France?", "中国的首都是哪里？"),
    *("What colour is a banana?", "水在多少度结冰？"),
)


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
