"""The same promises on CUDA; run with ``pytest -m gpu`` on a machine that has it."""

import math
from pathlib import Path

import pytest
import torch

from tests import launched
from tests.running import (
    assert_same,
    metrics_without_times,
    newest_state,
    read_metrics,
    tiny_flags,
    train_and_kill,
    train_in_process,
)
from tests.test_dataset import open_rows
from tests.test_fine_tuning import fine_tune, sft_flags
from tests.test_preferences import copy_of, dpo_flags, optimize
from trainer import fast_paths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # CUDA's own warnings are not ours to mend
]
CUDA = {"device": "cuda", "hidden_size": 64, "use_compile": 0}


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder) if "loss" in r]


@pytest.mark.parametrize("use_moe", [0, 1])
def test_cuda_loses_what_the_cpu_loses(tmp_path: Path, use_moe: int) -> None:
    train_in_process(tmp_path / "cpu", hidden_size=64, use_moe=use_moe)
    train_in_process(tmp_path / "cuda", **CUDA, use_moe=use_moe)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)


@pytest.mark.parametrize("use_compile", [0, 1])
@pytest.mark.parametrize("use_moe", [0, 1])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
def test_every_fast_path_works(
    tmp_path: Path, head_dim: int, use_moe: int, use_compile: int
) -> None:
    """Attention within documents on cards from 2020 on (compute capability 8)."""
    sizes = {"hidden_size": 4 * head_dim, "use_moe": use_moe, "use_compile": use_compile}
    flags = CUDA | sizes | {"dtype": "bfloat16", "epochs": 1, "strict_fast_path": 1}
    output = train_in_process(tmp_path, **flags)
    able = torch.cuda.get_device_capability() >= (8, 0)
    assert ("attention within documents" in output) == able


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_a_pass_of_one_row_and_of_all_lose_the_same(tmp_path: Path, micro_batch_size: int) -> None:
    flags = CUDA | {"dtype": "bfloat16", "hidden_size": 384}  # heads of 96
    train_in_process(tmp_path / "default", **flags)
    train_in_process(tmp_path / "given", **flags, micro_batch_size=micro_batch_size)
    assert losses(tmp_path / "given") == pytest.approx(losses(tmp_path / "default"), abs=0.02)


def test_attention_within_documents_loses_what_the_mask_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_process(tmp_path / "within", **CUDA, dtype="bfloat16")
    monkeypatch.setattr(fast_paths, "has_kernel_within_documents", lambda run: False)
    train_in_process(tmp_path / "masked", **CUDA, dtype="bfloat16")
    assert losses(tmp_path / "within") == pytest.approx(losses(tmp_path / "masked"), abs=0.02)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_made_on_the_device_are_those_of_the_host(tmp_path: Path, packing: bool) -> None:
    data = open_rows(tmp_path, length=16, packing=packing)
    rows = list(range(len(data) + 2))
    on_host = data.__getitems__(rows)
    data.to(torch.device("cuda"))
    data.__getitems__(rows[:1])  # the first of an epoch brings its layout to the device
    torch.cuda.set_sync_debug_mode("error")  # from here on nobody may wait for the device
    try:
        on_device = data.__getitems__(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for part, same in zip(on_device[:3], on_host[:3], strict=True):
        assert (part is None) == (same is None)
        if part is not None:
            assert part.is_cuda and torch.equal(part.cpu(), same)
    assert on_device.num_labels == on_host.num_labels


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("use_moe", [0, 1])
def test_half_precision_loses_nearly_the_same(tmp_path: Path, dtype: str, use_moe: int) -> None:
    for name in ("float32", dtype):
        train_in_process(tmp_path / name, **CUDA | {"use_moe": use_moe, "dtype": name})
    assert losses(tmp_path / dtype) == pytest.approx(losses(tmp_path / "float32"), abs=0.05)
    assert losses(tmp_path / dtype)[0] == pytest.approx(math.log(6400), abs=0.15)


@pytest.mark.parametrize("use_moe", [0, 1])
def test_compiled_loses_what_eager_loses(tmp_path: Path, use_moe: int) -> None:
    for use_compile in (0, 1):
        settings = CUDA | {"use_compile": use_compile, "use_moe": use_moe}
        train_in_process(tmp_path / str(use_compile), **settings)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), abs=1e-3)
    names = newest_state(tmp_path / "1", "pretrain_64" + "_moe" * use_moe)["model"]
    assert not any("_orig_mod" in name for name in names)


def test_a_killed_and_resumed_run_loses_what_the_uninterrupted_one_loses(tmp_path: Path) -> None:
    settings = CUDA | {"dropout": 0.1}
    train_in_process(tmp_path / "whole", **settings)
    train_and_kill(tmp_path / "cut", 7, **settings)
    train_in_process(tmp_path / "cut", **settings, from_resume=1)
    assert_same(
        newest_state(tmp_path / "cut", "pretrain_64")["progress"]["rows_seen"],
        newest_state(tmp_path / "whole", "pretrain_64")["progress"]["rows_seen"],
    )
    assert len(metrics_without_times(tmp_path / "cut")) == len(
        metrics_without_times(tmp_path / "whole")
    )
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_bad_update_is_left_out_on_the_device(tmp_path: Path, dtype: str, where: str) -> None:
    bad = ("poison", {"steps": [3], "value": "nan", "where": where})
    words = tiny_flags(tmp_path, **CUDA | {"dtype": dtype, "epochs": 1})
    log = tmp_path / "log"
    assert launched.run_trainers(words, log, faults=[bad]) == [0], log.read_text()
    assert "update 3: loss or gradient is not finite (rank 0" in log.read_text()
    state = newest_state(tmp_path, "pretrain_64")
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_the_micro_batch_that_memory_allows_loses_what_a_small_one_loses(tmp_path: Path) -> None:
    output = train_in_process(tmp_path / "chosen", **CUDA)
    assert "pass: 8 rows, 1 passes per update" in output
    assert "pass: 2 rows, " in train_in_process(tmp_path / "small", **CUDA, micro_batch_size=2)
    assert losses(tmp_path / "chosen") == pytest.approx(losses(tmp_path / "small"), abs=1e-3)


@pytest.mark.parametrize("use_moe", [0, 1])
def test_muon_loses_on_cuda_what_it_loses_on_the_cpu(tmp_path: Path, use_moe: int) -> None:
    settings = {"hidden_size": 64, "optimizer": "muon", "lr_schedule": "wsd", "use_moe": use_moe}
    train_in_process(tmp_path / "cpu", **settings)
    train_in_process(tmp_path / "cuda", **CUDA | settings)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=0.02)


BEST = {"recipe": "best", "max_seq_len": 64, "packing": 1}


def test_the_best_recipe_loses_on_cuda_what_it_loses_on_the_cpu(tmp_path: Path) -> None:
    train_in_process(tmp_path / "cpu", hidden_size=64, **BEST)
    train_in_process(tmp_path / "cuda", **CUDA | BEST)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=0.02)


def test_the_best_recipe_takes_every_fast_path_within_a_given_time(tmp_path: Path) -> None:
    """Rate and rows by rule from a measurement on the card, the start from counts, the average."""
    changes = BEST | {"device": "cuda", "dtype": "bfloat16", "strict_fast_path": 1}
    changes |= {"learning_rate": "auto", "batch_size": "auto", "accumulation_steps": 1}
    output = train_in_process(tmp_path, **changes, hidden_size=384, max_minutes=1)
    assert "auto: --learning_rate" in output and losses(tmp_path)


def test_the_best_recipe_killed_and_resumed_loses_the_same(tmp_path: Path) -> None:
    settings = CUDA | BEST
    train_in_process(tmp_path / "whole", **settings)
    train_and_kill(tmp_path / "cut", 7, **settings)
    train_in_process(tmp_path / "cut", **settings, from_resume=1)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-3)


def test_conversations_lose_on_cuda_what_they_lose_on_the_cpu(tmp_path: Path) -> None:
    fine_tune(tmp_path / "cpu", hidden_size=64)
    fine_tune(tmp_path / "cuda", **CUDA)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)
    compiled = CUDA | {"use_compile": 1, "dtype": "bfloat16", "strict_fast_path": 1}
    fine_tune(tmp_path / "fast", **compiled | {"hidden_size": 128})
    fine_tune(tmp_path / "slow", **CUDA | {"hidden_size": 128})
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "slow"), abs=0.05)


def test_conversations_killed_and_resumed_lose_the_same(tmp_path: Path) -> None:
    settings = CUDA | {"dropout": 0.1, "system_share": 0.5}
    fine_tune(tmp_path / "whole", **settings)
    cut = tmp_path / "cut"
    train_and_kill(cut, 10, 1, sft_flags(cut, **settings), "train_full_sft.py")
    fine_tune(cut, **settings, from_resume=1)
    assert losses(cut) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_preferences_lose_on_cuda_what_they_lose_on_the_cpu(tmp_path: Path) -> None:
    fine_tune(tmp_path / "start", epochs=1)
    kinds = {
        "cpu": {},
        "cuda": {"device": "cuda", "use_compile": 0},
        "fast": {"device": "cuda", "use_compile": 1, "dtype": "bfloat16", "packing": 1},
    }
    for name, changes in kinds.items():
        folder = copy_of(tmp_path / "start", tmp_path / name)
        optimize(folder, **{"dropout": 0.0} | changes)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)
    assert losses(tmp_path / "fast")[-1] < 0.9 * losses(tmp_path / "fast")[0]


def test_preferences_killed_and_resumed_lose_the_same(tmp_path: Path) -> None:
    fine_tune(tmp_path / "start", epochs=1)
    settings = {"device": "cuda", "use_compile": 0}
    whole = copy_of(tmp_path / "start", tmp_path / "whole")
    optimize(whole, **settings)
    cut = copy_of(tmp_path / "start", tmp_path / "cut")
    train_and_kill(cut, 7, 1, dpo_flags(cut, **settings), "train_dpo.py")
    optimize(cut, **settings, from_resume=1)
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-4)
