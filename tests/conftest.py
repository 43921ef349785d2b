"""One thread for every test, since how a sum is split over threads decides its last bits; and the
quick tests first."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from tests.strict import make_strict

torch.set_num_threads(1)
make_strict()
# Before any test starts the server of processes: without it each run would import torch anew.
multiprocessing.set_forkserver_preload(["tests.launched"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that train nothing come first, then those that train, then those that fork trainers."""

    def cost(item: pytest.Item) -> int:
        used = list(vars(getattr(item, "module", None) or object).values())
        homes = {getattr(value, "__module__", getattr(value, "__name__", "")) for value in used}
        return ("tests.running" in homes) + 2 * ("tests.launched" in homes)

    items.sort(key=cost)


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """A failed test must not leave a training behind that slows the others down, nor any test what
    it set in the environment, such as its folder of compiled code."""
    with mock.patch.dict(os.environ):
        yield
    if "tests.launched" in sys.modules:
        sys.modules["tests.launched"].kill_leftovers()
