"""Direct preference optimization: the loss of pairs of answers, and the reference that it needs.

Shapes: P pairs in a batch, N in the corpus, B rows of T tokens.
Source: DPO (Rafailov et al. 2023), equation 7; the cross-entropy: Pang et al. 2024, section 2.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.model_minimind import (
    IGNORE,
    CausalLMOutput,
    MiniMindConfig,
    MiniMindForCausalLM,
    nats_of_each,
    shifted,
)
from trainer import distributed
from trainer.checkpoint import write_atomically
from trainer.console import log
from trainer.errors import SettingsError
from trainer.flags import DECIDES, TrainConfig, flag
from trainer.reading import digest_of_file, open_regular
from trainer.weights import existing, init_model, weights_path

MAX_REFERENCE_BYTES = 2**32  # of 500 million pairs
MEASURES = ("accuracy", "margin", "chosen_reward", "rejected_reward")


@dataclass
class PreferenceFlags:
    """preferences"""

    beta: float = flag(
        0.15,
        "of DPO: how much a change of an answer's log-probability counts; the higher, the closer "
        "the model stays to --from_weight",
        resume=DECIDES,
        above=0,
        below=1e3,
    )
    sft_weight: float = flag(
        0.0,
        "adds this times the cross-entropy of the chosen answer's tokens, in nats per token, which "
        "keeps chosen answers from becoming improbable, too",
        resume=DECIDES,
        least=0,
        below=1e3,
    )


@dataclass
class PreferenceOutput(CausalLMOutput):
    """With ``loss``, the mean over pairs, and other means over pairs, all ()."""

    accuracy: Tensor | None = None  # share of pairs with a positive margin
    margin: Tensor | None = None  # chosen_reward - rejected_reward
    chosen_reward: Tensor | None = None  # beta * how much more probable the answer became, nats
    rejected_reward: Tensor | None = None


def of_answers(values: Tensor, batch: Any) -> Tensor:
    """Values (B, T) of the tokens, summed over each answer: (P, 2), chosen and rejected.

    Without adding atomically: on a GPU, the order of the sums would change from run to run."""
    t = torch.arange(batch.longest, device=values.device)
    inside = t < batch.length[..., None]  # (P, 2, longest)
    place = torch.where(inside, batch.first[..., None] + t, 0)
    return torch.where(inside, values.flatten()[place], 0).sum(-1)


def preference_loss(
    model: MiniMindForCausalLM, batch: Any, *, beta: float, sft_weight: float = 0.0
) -> PreferenceOutput:
    """The DPO loss of a batch, see PreferenceBatch in dataset/chat_datasets.py.

    Per pair: -log sigmoid(beta * margin), plus ``sft_weight`` times the mean cross-entropy of the
    chosen answer's tokens; the margin is of log-probabilities over the reference's."""
    out = model(**batch.model_inputs)
    nats = of_answers(out.nats, batch)  # minus log-probabilities
    rewards = beta * (-nats - batch.reference)  # (P, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -F.logsigmoid(margin)
    if sft_weight:
        learned = shifted(batch.model_inputs["labels"]) != IGNORE
        losses = losses + sft_weight * nats[:, 0] / of_answers(learned, batch)[:, 0].clamp(min=1)
    of_pairs = (losses, (margin > 0).to(losses.dtype), margin, *rewards.unbind(1))
    means = [part.sum() / max(1, len(margin)) for part in of_pairs]
    named = dict(zip(MEASURES, means[1:], strict=True))
    kept = {f.name: getattr(out, f.name) for f in fields(out)} | {"loss": means[0]}
    return PreferenceOutput(**kept, **named)


# -------------------------------------------------------------------------------------- reference


def reference(
    args: TrainConfig,
    config: MiniMindConfig,
    device: torch.device,
    corpus: str,
    batches: Iterable[Any],
    empty: Tensor,
) -> tuple[Tensor, str]:
    """Log-probability of both answers of all pairs by --from_weight, made once and kept.

    Args: corpus: tells corpora apart; batches: of all pairs; empty: (N, 2) float32.
    Returns: (N, 2) float32, nats, and the digest of the weights.
    Raises: CheckpointError, SettingsError."""
    if args.from_weight in ("none", args.save_weight):
        raise SettingsError(
            f"--from_weight is {args.from_weight}, expected a fine-tuned model that stays as it "
            f"is: the reference. Its name must differ from --save_weight."
        )
    weights = digest_of_file(existing(weights_path(args.save_dir, args.from_weight, config)))
    decisive = [corpus, weights, args.architecture(), args.max_seq_len, args.dtype]
    name = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(args.cache_dir) / f"{name}.reference"

    def make() -> None:
        if read_reference(path) is None:
            log(f"scoring {len(empty):,} pairs with {args.from_weight}, the reference")
            start = args.from_weight, args.tokenizer_path, args.save_dir, device
            write_reference(
                path, log_probabilities(init_model(config, *start)[0], batches, args, empty)
            )

    distributed.on_each_machine(make)
    found = read_reference(path)
    assert found is not None, "just written"
    return found, weights


@torch.inference_mode()
def log_probabilities(
    model: MiniMindForCausalLM, batches: Iterable[Any], args: TrainConfig, empty: Tensor
) -> Tensor:
    """Of both answers of each pair in nats, in the shape of ``empty``, (N, 2) float32."""
    found, device = torch.full_like(empty, torch.nan), model.device
    dtype = args.torch_dtype
    model.model.residual_dtype = getattr(torch, str(args.residual_dtype))
    model.next_token_nats = nats_of_each
    model.eval()
    for batch in batches:
        on_device = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(**on_device.model_inputs)
        found[batch.pair] = -of_answers(out.nats, on_device).float().cpu()
    return found


def write_reference(path: Path, values: Tensor) -> None:
    """Write (N, 2) float32, with a digest. Raises: OSError."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, hashlib.sha256(data).digest() + data)


def read_reference(path: Path) -> Tensor | None:
    """What was written; None if there is nothing, or it is damaged."""
    if not path.exists():
        return None
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            digest, data = file.read(32), file.read() if size < MAX_REFERENCE_BYTES else b""
    except OSError:
        digest, data = b"", b""
    if hashlib.sha256(data).digest() != digest:
        log(f"warning: {path} is damaged; computing the reference again")
        return None
    return torch.load(io.BytesIO(data), weights_only=True)
