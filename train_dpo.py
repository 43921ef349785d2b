"""Teach a fine-tuned model which of two answers is preferred (direct preference optimization).

    python train_dpo.py --preset demo                 # after train_full_sft.py --preset demo
    python train_dpo.py --data_path pairs.jsonl       # the weights out/full_sft_768.pth
    torchrun --nproc_per_node 8 train_dpo.py          # on eight GPUs
    python train_dpo.py --from_resume 1               # resume after a kill
    python eval_llm.py --weight dpo --interactive 1

The loop, its flags and its guarantees are those of train_pretrain.py; the unit is a pair of
conversations, ``chosen`` and ``rejected``. See trainer/preferences.py for the loss.
"""

if __name__ == "__main__":
    import trainer.host

    trainer.host.begin_program()

import sys
from functools import partial
from typing import Any

from dataset.chat_datasets import DPODataset
from model.model_minimind import MiniMindConfig, nats_of_each
from train_full_sft import open_data
from train_pretrain import build_run, train, train_step
from trainer import distributed
from trainer.command_line import parse_flags
from trainer.console import log
from trainer.flags import Program, TrainConfig
from trainer.guard.guard import Guard
from trainer.preferences import MEASURES, PreferenceFlags, preference_loss, reference
from trainer.program import run_program
from trainer.run import Run

TOKENS_AT_ONCE = 8192  # of the reference, which needs no gradients

DPO = Program(
    "dpo",
    defaults={
        "save_weight": "dpo",
        "from_weight": "full_sft",
        "data_path": ["dataset/dpo.jsonl"],
        "max_seq_len": 1024,
        "batch_size": 4,
        "accumulation_steps": 1,
        "learning_rate": 4e-8,
        "log_interval": 100,
        "save_interval": 100,
        "wandb_project": "MiniMind-DPO",
    },
    presets={
        "demo": {
            "data_path": ["dataset/preference_sample.jsonl"],
            "heldout_fraction": 0.05,
            "max_seq_len": 128,
            "epochs": 1,
            "batch_size": 4,
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "beta": 0.5,
            "sft_weight": 1.0,
            "lr_schedule": "wsd",
            "log_interval": 10,
        }
    },
    flags=PreferenceFlags,
    documents="pairs",
    unit="pairs",
    per_row=2,
)


def build_dpo_run(args: TrainConfig, config: MiniMindConfig, data: DPODataset, *rest: Any) -> Run:
    """As build_run, with the reference, and the loss of pairs.

    Raises: SettingsError, CheckpointError."""
    assert isinstance(args, PreferenceFlags)
    *_, device = rest
    corpus, batches = data.cache.folder.name, data.of_all_pairs(TOKENS_AT_ONCE)
    scores, weights = reference(args, config, device, corpus, batches, data.reference)
    data.reference.copy_(scores)  # also that of held-out rows
    if data.num_cut:
        log(f"warning: {data.num_cut:,} pairs are cut at --max_seq_len {args.max_seq_len}")
    run = build_run(args, config, data, *rest)
    run.model.next_token_nats = nats_of_each
    run.loss_of = partial(preference_loss, beta=args.beta, sft_weight=args.sft_weight)
    run.measures = MEASURES
    run.settings["content of from_weight"] = weights[:16]
    return run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, see trainer/errors.py."""

    def program() -> None:
        config = parse_flags(argv, __doc__, DPO)
        with Guard(config) as guard:
            train(config, guard, partial(open_data, kind=DPODataset), build_dpo_run, train_step)
            distributed.close()

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
