"""How many rows a device works on at once: chosen, tried, and the same on all ranks.

Memory is short for real: a process may take only so much, and torch's allocator fails."""

import itertools
import json
from pathlib import Path

import pytest

from tests import fitting
from tests.gradients import toy_data
from tests.launched import run_trainers
from trainer.run import largest_divisor

ROWS = 96  # of an update on each rank; a row takes some 10 MiB


def fitted(folder: Path, *numbers: int, ranks: int = 1) -> list[dict]:
    """What each rank chose and tried."""
    toy_data(folder)
    log = folder / "log"
    log.unlink(missing_ok=True)
    words = [str(folder), *map(str, numbers)]
    assert run_trainers(words, log, ranks, program=fitting.main) == [0] * ranks, log.read_text()
    found = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(ranks)]
    notes = log.read_text().count("rows does not fit in memory; trying")
    estimated = len(numbers) == 2 and numbers[1] > 0  # by two passes
    assert notes == len(found[0]["tried"]) - 1 - 2 * estimated
    return found


def test_the_estimate_fits_and_is_not_much_too_small(tmp_path: Path) -> None:
    (found,) = fitted(tmp_path, 400, 400)
    assert found["tried"] == [1, 2, found["chosen"]], "fits at once"
    (more,) = fitted(tmp_path, 400, 4 * 400)
    assert more["tried"][2] > more["chosen"], "four times as much does not fit"
    assert found["chosen"] <= more["chosen"] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_do_not_fit_are_halved_until_they_do_on_all_ranks(
    tmp_path: Path, ranks: int
) -> None:
    """Only the last rank is short of memory."""
    found = fitted(tmp_path, 300, 10**6, ROWS, ranks=ranks)
    assert all(one == found[0] for one in found)
    tried = found[0]["tried"]
    assert tried[0] == ROWS and tried[-1] == found[0]["chosen"] < ROWS
    assert all(after == before // 2 for before, after in itertools.pairwise(tried))


def test_without_an_estimate_the_batch_size_is_tried(tmp_path: Path) -> None:
    """As on MPS, which does not tell what it has left."""
    assert fitted(tmp_path, 400, 0) == [{"chosen": 8, "tried": [8]}]
    assert fitted(tmp_path, 60, 0) == [{"chosen": 4, "tried": [8, 4]}]


def test_not_even_one_row_is_the_allocator_s_own_error(tmp_path: Path) -> None:
    toy_data(tmp_path)
    words, log = [str(tmp_path), "4", "4", "2"], tmp_path / "log"
    assert run_trainers(words, log, program=fitting.main) != [0]
    assert "DefaultCPUAllocator" in log.read_text().splitlines()[-1]


def test_the_largest_divisor_is_the_largest_that_divides() -> None:
    for number in range(1, 50):
        for limit in range(1, 60):
            divisors = [d for d in range(1, number + 1) if number % d == 0 and d <= limit]
            assert largest_divisor(number, limit) == max(divisors)
    assert largest_divisor(12, 0.5) == 1
