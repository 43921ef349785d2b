"""What TRL's DPOTrainer computes for the pairs of test_preferences.py.

    python -m tests.trl_reference    # needs trl; writes tests/golden/trl_dpo.json

Policy and reference are tiny models with drawn weights, loaded by transformers' own Qwen3 class.
"""

import json
import tempfile
from pathlib import Path

import torch

from dataset.chat_datasets import DPODataset
from model.model_minimind import MiniMindForCausalLM
from tests.helpers import ROOT, shipped_tokenizer, tiny_model
from tests.test_conversations import write

GOLDEN = ROOT / "tests" / "golden" / "trl_dpo.json"
BETA, WEIGHT, LENGTH = 0.3, 0.5, 64


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pair(prompt: list[dict], chosen: str, rejected: str) -> dict:
    return {
        "chosen": [*prompt, turn("assistant", chosen)],
        "rejected": [*prompt, turn("assistant", rejected)],
    }


def some_pairs() -> list[dict]:
    """Short and long, of one turn and several, in two languages; one answer begins the other."""
    france = [turn("user", "What is the capital of France?")]
    more = [*france, turn("assistant", "Paris."), turn("user", "And of Japan?")]
    system = [turn("system", "Be brief."), turn("user", "水在多少度结冰？")]
    return [
        pair(france, "Paris.", "The capital of France is Paris."),
        pair(more, "Tokyo.", "It is Kyoto, as everybody knows."),
        pair(system, "零摄氏度。", "水在零摄氏度的时候会结成冰。"),
        pair(france, "Paris", "Paris is it."),
        pair(more, "Tokyo is the capital of Japan.", "No."),
    ]


def models() -> tuple[MiniMindForCausalLM, MiniMindForCausalLM]:
    """Policy and reference."""
    sizes = {"vocab_size": len(shipped_tokenizer()), "max_position_embeddings": 256}
    return tiny_model(1, **sizes), tiny_model(2, **sizes)


def qwen(model: MiniMindForCausalLM, folder: Path) -> Path:
    """The model as transformers saves it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    config = Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        intermediate_size=c.intermediate_size,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True,
        max_position_embeddings=c.max_position_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    theirs = Qwen3ForCausalLM(config)
    theirs.load_state_dict(model.tensors_for_qwen())
    theirs.save_pretrained(folder)
    shipped_tokenizer().save_pretrained(folder)
    return folder


def by_trl(folder: Path, weight: float) -> dict[str, float | dict[str, float]]:
    """Loss, metrics, and the norm of each weight's gradient, in one batch of all pairs.

    Args: weight: of the cross-entropy of the chosen answers."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    policy, reference = models()
    args = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=len(some_pairs()),
        beta=BETA,
        loss_type=["sigmoid", "sft"] if weight else ["sigmoid"],
        loss_weights=[1.0, weight] if weight else [1.0],
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    found = [qwen(model, folder / str(i)) for i, model in enumerate((policy, reference))]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(found[0], dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(found[1], dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(some_pairs()),
        processing_class=shipped_tokenizer(),
    )
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return {
        "loss": loss.item(),
        "accuracy": metrics["rewards/accuracies"],
        "margin": metrics["rewards/margins"],
        "chosen_reward": metrics["rewards/chosen"],
        "rejected_reward": metrics["rewards/rejected"],
        "gradients": {name: p.grad.norm().item() for name, p in named if p.grad is not None},
    }


def pairs_in_rows(folder: Path, **choice: object) -> DPODataset:
    path = write(folder / "pairs.jsonl", some_pairs())
    return DPODataset(
        str(path), shipped_tokenizer(), LENGTH, cache_dir=str(folder / "cache"), **choice
    )


def main() -> None:
    """Write the golden file."""
    import trl

    with tempfile.TemporaryDirectory() as folder:
        found = {f"weight {w}": by_trl(Path(folder), w) for w in (0.0, WEIGHT)}
    found["versions"] = {"trl": trl.__version__, "torch": torch.__version__}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
