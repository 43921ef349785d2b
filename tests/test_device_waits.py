"""An update on a device: nobody asks it for a number, and no view of what may be strided.

Without a card. Tensors without numbers (torch's FakeTensor) go through the real forward and
backward pass, clipping and update: whoever asks for a value, as ``.item()`` does, raises, and so
does a view of strides that the kernel's own shape function gives. What kernels compute is not
looked at."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.model_minimind import MiniMindForCausalLM
from tests.helpers import tiny_config
from trainer.optimizer import OPTIMIZERS, Tuning, build_optimizer, skips_bad_updates, step_if_finite

BEST = Tuning(muon_beta2=0.95, muon_period=2)  # what adds to Muon's step
HEAD_WIDTH = {"hidden_size": 64, "head_dim": 96}  # of the heads, as the 64 M model ships them


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    ("optimizer", "tuning"), [*((name, Tuning()) for name in OPTIMIZERS), ("muon", BEST)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_an_update_asks_the_device_nothing(
    dtype: torch.dtype, optimizer: str, tuning: Tuning, use_moe: bool, num_rows: int
) -> None:
    if use_moe and dtype == torch.float16:
        pytest.skip("experts wait in float16: there is no grouped kernel for it")
    assert skips_bad_updates(OPTIMIZERS[optimizer])  # tried once, with real tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = MiniMindForCausalLM(tiny_config(**HEAD_WIDTH, use_moe=use_moe))
        model.attends_within = True
        stepping = build_optimizer(model, 1e-3, optimizer, dtype, tuning)
        ids = torch.ones(num_rows, 32, dtype=torch.int64)
        with torch.autocast("cpu", dtype):
            out = model(ids, labels=ids, document_starts=torch.zeros_like(ids), max_documents=8)
        (out.loss + out.aux_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_if_finite(
            stepping, torch.amp.GradScaler("cpu", enabled=False), out.loss.detach()[None], norm
        )


def test_a_question_to_the_device_is_noticed() -> None:
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.ones(3).sum().item()
