"""Another kind of training is a file like this one: rows with a loss mask of its own, through the
same loop, with the same guarantees. Here only what stands behind an arrow is learned."""

import multiprocessing
import os
import signal
from pathlib import Path

import torch

from dataset.lm_dataset import IGNORE, Batch, PretrainDataset
from tests import running
from tests.helpers import shipped_tokenizer
from train_pretrain import Guard, build_run, train, train_step
from trainer.command_line import parse_flags
from trainer.program import run_program

ARROW = shipped_tokenizer().encode("=>", add_special_tokens=False)[-1]


class Answers(PretrainDataset):
    """Each document's tokens up to its arrow carry no loss."""

    def __getitems__(self, rows: list[int]) -> Batch:
        batch = super().__getitems__(rows)
        t = torch.arange(batch.input_ids.shape[1])
        arrows = torch.where(batch.input_ids == ARROW, t, -1).cummax(dim=1).values  # the last one
        asked = arrows < batch.document_starts  # it stands before this document
        asked |= t == arrows
        labels = batch.labels.masked_fill(asked, IGNORE)
        return batch._replace(labels=labels, num_labels=int((labels[:, 1:] != IGNORE).sum()))


def fine_tune(argv: list[str], killed_at: int = 0) -> int:
    """The program: its data, and an update that may be the last one."""

    def step(run: object, window: list[Batch], num_labels: int) -> object:
        if run.step + 1 == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(run, window, num_labels)

    def program() -> None:
        config = parse_flags(argv)
        with Guard(config) as guard:
            train(config, guard, open_answers, build_run, step)

    def open_answers(config: object, tokenizer: object) -> Answers:
        choice = {"seed": config.seed, "heldout_fraction": config.heldout_fraction}
        source = config.data_path, tokenizer, config.max_seq_len
        return Answers(*source, **choice, cache_dir=config.cache_dir)

    return run_program(program)


def folder_with_questions(folder: Path) -> list[str]:
    folder.mkdir()
    pairs = [f"question {i} of {i % 7} => answer {i % 5}" for i in range(60)]
    running.write_corpus(folder / "corpus.jsonl", pairs)
    return running.tiny_flags(folder, epochs=8, learning_rate=1e-2, dropout=0.1)


def test_a_loss_mask_of_one_s_own_trains_and_resumes_to_the_last_bit(tmp_path: Path) -> None:
    whole, cut = folder_with_questions(tmp_path / "whole"), folder_with_questions(tmp_path / "cut")
    assert fine_tune(whole) == 0
    records = running.read_metrics(tmp_path / "whole")
    learned = [record["loss"] for record in records if "loss" in record]
    assert learned[-1] < 0.6 * learned[0] and "heldout_loss" in records[-1]
    child = multiprocessing.get_context("forkserver").Process(target=fine_tune, args=(cut, 12))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert fine_tune([*cut, "--from_resume", "1"]) == 0
    for part in ("model", "optimizer", "rng", "progress"):
        found, expected = (running.newest_state(tmp_path / name)[part] for name in ("cut", "whole"))
        running.assert_same(found, expected, part)
    assert running.metrics_without_times(tmp_path / "cut") == running.metrics_without_times(
        tmp_path / "whole"
    )
