"""The gradient that one update uses, for any way to split its rows."""

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoTokenizer

import train_pretrain
from dataset.lm_dataset import PretrainDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers import perturbed
from tests.running import short_documents, write_corpus
from trainer import distributed
from trainer.flags import TrainConfig
from trainer.progress import Outcome
from trainer.run import Run
from trainer.step_times import StepTimes

ROWS = 11  # of the epoch: not a multiple of any batch, so that the last window is short


def toy_data(folder: Path, **options: object) -> PretrainDataset:
    """Rows of documents of unequal length."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, short_documents(15))
    tokenizer = AutoTokenizer.from_pretrained("model")
    return PretrainDataset(str(corpus), tokenizer, 48, cache_dir=str(folder / "cache"), **options)


def toy_model(use_moe: bool = False, **sizes: object) -> MiniMindForCausalLM:
    """Two layers in float64, always the same, none of whose weights is zero; experts' imbalance
    weighs enough to be seen."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 6400} | sizes
    config = MiniMindConfig(32, 2, use_moe, router_aux_loss_coef=0.1, **sizes)
    return perturbed(MiniMindForCausalLM(config).double(), 0.02)


def toy_run(data: PretrainDataset, model: MiniMindForCausalLM, **flags: object) -> Run:
    """A run whose optimizer moves each weight by minus its gradient."""
    defaults = {"epochs": 1, "num_workers": 0, "device": "cpu", "timeout": 9}
    defaults |= {"grad_clip": float("inf"), "micro_batch_size": None}
    return Run(
        args=TrainConfig(**defaults | flags),
        config=model.config,
        settings={},
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0, fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=nullcontext(),
        device=torch.device("cpu"),
        rows_per_epoch=len(data),
        rounding={},
        documents_of=data.documents_of,
        times=StepTimes(torch.device("cpu")),
    )


def step(run: Run, window: list) -> tuple[Outcome, int]:
    """One update; its outcome, and its labels on all ranks."""
    num_labels = int(distributed.totals(sum(batch.num_labels for batch in window))[0])
    return train_pretrain.train_step(run, window, num_labels), num_labels


def window_gradient(
    folder: Path,
    batch_size: int,
    accumulation_steps: int,
    use_moe: bool,
    micro_batch_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """Gradient of the epoch's only window by parameter, and its mean losses under "losses"."""
    data = toy_data(folder)
    model = toy_model(use_moe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = toy_run(
        data,
        model,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        micro_batch_size=micro_batch_size,
    )
    ((window, num_rows),) = train_pretrain.windows(run, data)
    assert num_rows == len(data) == ROWS
    assert {len(batch.input_ids) for batch in window} == {micro_batch_size or batch_size}
    outcome, num_labels = step(run, window)
    gradient = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    return gradient | {"losses": torch.stack(outcome[:2]) / num_labels}
