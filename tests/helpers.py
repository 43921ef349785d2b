"""Small models, the bundled tokenizer and files, for tests that need no training run."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).parent.parent


def digest(data: bytes) -> str:
    """As in the name of a state with these bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write JSONL with one document per line. Returns: ``path``."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes("".join(lines).encode("utf-8"))
    return path


@cache
def shipped_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer in model/: 6,400 tokens, padding 0, BOS 1, EOS 2."""
    return AutoTokenizer.from_pretrained(str(ROOT / "model"))


def tiny_config(**changes: object) -> MiniMindConfig:
    """Two layers of width 32, with ``changes`` applied."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    return MiniMindConfig(**(sizes | changes))


@torch.no_grad()
def perturbed(model: MiniMindForCausalLM, deviation: float) -> MiniMindForCausalLM:
    """Add noise to all weights, in place: initially layers add zero and norms scale by one."""
    for weight in model.parameters():
        weight += deviation * torch.randn_like(weight)
    return model


def tiny_model(seed: int = 0, **changes: object) -> MiniMindForCausalLM:
    """A model in which every weight matters: none is zero, one or negligible."""
    torch.manual_seed(seed)
    return perturbed(MiniMindForCausalLM(tiny_config(**changes)).eval(), 0.2)


def start_python(*arguments: object) -> subprocess.Popen:
    """Start a Python process in the root of the repository, with pipes for input and output."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
