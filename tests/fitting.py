"""Run by the ranks of the tests in test_micro_batch: rows are chosen where memory is short."""

import json
import resource
from pathlib import Path

import torch

import train_pretrain
from tests.gradients import toy_data, toy_model, toy_run
from trainer import distributed
from trainer.micro_batch import fit_micro_batch


def main(argv: list[str]) -> int:
    """FOLDER FREE_MIB BELIEVED_MIB [ROWS]

    The last rank may take FREE_MIB more than it has; all believe in BELIEVED_MIB; if 0, they do
    not know."""
    folder, (free, believed, *rows) = Path(argv[0]), map(int, argv[1:])
    distributed.init_distributed_mode("cpu")
    torch.set_num_threads(1)
    data, model = toy_data(folder), toy_model()
    run = toy_run(data, model, batch_size=8, accumulation_steps=12)
    run.args.max_seq_len, run.args.micro_batch_size = 48, rows[0] if rows else None
    tried, before = [], [p.detach().clone() for p in model.parameters()]

    def one_pass(num_rows: int) -> torch.Tensor:
        tried.append(num_rows)
        return train_pretrain.forward_backward(run, data.__getitems__([0] * num_rows), 1.0)

    one_pass(1)  # whatever is loaded late
    run.optimizer.zero_grad()
    tried.clear()
    if distributed.rank() == distributed.world_size() - 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + free * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fit_micro_batch(run, one_pass, believed * 2**20 or None)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, value)
    found = {"chosen": run.micro_batch, "tried": tried}
    (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.close()
    return 0
