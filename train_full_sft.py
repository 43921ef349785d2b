"""Fine-tune a pretrained model on conversations, so that it answers.

    python train_full_sft.py --preset demo            # after train_pretrain.py --preset demo
    python train_full_sft.py --data_path chats.jsonl  # the weights out/pretrain_768.pth
    torchrun --nproc_per_node 8 train_full_sft.py     # on eight GPUs
    python train_full_sft.py --from_resume 1          # resume after a kill
    python eval_llm.py --weight full_sft --interactive 1

The loop, its flags and its guarantees are those of train_pretrain.py; rows are conversations, and
the loss is on what the assistant says.
"""

if __name__ == "__main__":
    import trainer.host

    trainer.host.begin_program()

import sys
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from dataset.chat_datasets import SFTDataset
from dataset.token_cache import TokenCache, build_token_cache
from train_pretrain import build_run, train, train_step
from trainer import distributed
from trainer.command_line import parse_flags
from trainer.flags import DECIDES, Program, TrainConfig, flag
from trainer.guard.guard import Guard
from trainer.program import run_program

share = partial(flag, resume=DECIDES, least=0, most=1)


@dataclass
class ChatFlags:
    """conversations"""

    system_share: float = share(0.0, "share that gets a system turn; MiniMind: 0.2", older=0.0)
    empty_thinking: float = share(1.0, "share that keeps empty thinking; MiniMind: 0.2", older=1.0)


FULL_SFT = Program(
    "full_sft",
    flags=ChatFlags,
    defaults={
        "save_weight": "full_sft",
        "from_weight": "pretrain",
        "data_path": ["dataset/sft_t2t_mini.jsonl"],
        "max_seq_len": 768,
        "epochs": 2,
        "batch_size": 16,
        "accumulation_steps": 1,
        "learning_rate": 1e-5,
        "log_interval": 100,
        "wandb_project": "MiniMind-Full-SFT",
    },
    documents="conversations",
    presets={
        "demo": {
            "data_path": ["dataset/chat_sample.jsonl"],
            "heldout_fraction": 0.02,
            "max_seq_len": 256,
            "epochs": 2,
            "batch_size": 8,
            "optimizer": "muon",
            "learning_rate": 2e-3,
            "lr_schedule": "wsd",
            "log_interval": 20,
        }
    },
)


def open_data(
    args: TrainConfig, tokenizer: PreTrainedTokenizerBase, kind: type[SFTDataset] = SFTDataset
) -> SFTDataset:
    """The rows, tokenized by one process of each machine. Raises: DataError."""
    choice = {"empty_thinking": args.empty_thinking} if isinstance(args, ChatFlags) else {}

    def build() -> str:
        source = args.data_path, tokenizer, args.cache_dir, args.bad_records
        return str(build_token_cache(*source, content=kind.content(tokenizer, **choice)).folder)

    return kind(
        TokenCache.open(distributed.on_each_machine(build)),
        tokenizer,
        args.max_seq_len,
        packing=bool(args.packing),
        seed=args.seed,
        heldout_fraction=args.heldout_fraction,
        system_share=args.system_share if isinstance(args, ChatFlags) else 0.0,
    )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, see trainer/errors.py."""

    def program() -> None:
        config = parse_flags(argv, __doc__, FULL_SFT)
        with Guard(config) as guard:
            train(config, guard, open_data, build_run, train_step)
            distributed.close()

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
