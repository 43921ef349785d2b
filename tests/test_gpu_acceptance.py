"""The report of the first minutes on a card, made without one: no part harms another."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_acceptance import PARTS, Acceptance, Failed
from tests.helpers import ROOT, write_jsonl
from tests.running import run_command, short_documents


@pytest.fixture
def acceptance(tmp_path: Path) -> Acceptance:
    args = argparse.Namespace(device="cpu", budget_minutes=5.0, report=str(tmp_path / "report"))
    return Acceptance(args, tmp_path)


def test_a_part_that_fails_is_named_and_the_others_go_on(
    acceptance: Acceptance, tmp_path: Path
) -> None:
    acceptance.add("broken", lambda _: (str(1 / 0), None))
    acceptance.add("whole", lambda _: ("it works", 5))
    page = (tmp_path / "report.md").read_text()
    assert "## broken\n\n**failed:** ZeroDivisionError" in page and "## whole\n\nit works" in page
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["broken"]["found"] == {"failed": "division by zero"}
    assert found["whole"]["found"] == 5


@pytest.mark.parametrize("deaf", [False, True])
def test_a_command_that_hangs_ends_with_its_children(acceptance: Acceptance, deaf: bool) -> None:
    program = "import signal, subprocess; print('begun', flush=True); "
    program += "signal.signal(signal.SIGINT, signal.SIG_IGN); " * deaf  # and so does the child
    program += "p = subprocess.Popen(['sleep', '987']); print(p.pid, flush=True); p.wait()"
    with pytest.raises(Failed, match="took more than 3 s") as caught:
        acceptance.run(["-c", program], 3)
    assert ("KeyboardInterrupt" in str(caught.value)) != deaf  # it says where it was
    found = re.search(r"begun\n(\d+)$", str(caught.value), re.MULTILINE)
    assert found
    status = Path(f"/proc/{found[1]}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "(zombie)" not in status.read_text():  # which nobody waits for
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_command_that_fails_is_told_by_its_status(acceptance: Acceptance) -> None:
    with pytest.raises(Failed, match="exit status 3"):
        acceptance.run(["-c", "raise SystemExit(3)"], 3)


def test_when_the_time_is_up_the_rest_is_named(acceptance: Acceptance, tmp_path: Path) -> None:
    acceptance.args.budget_minutes = 0.0
    acceptance.add("late", lambda _: ("", None))
    assert "there was no time left" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_each_part_runs_on_a_cpu(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", short_documents(1_500))
    words = "-m bench.gpu_acceptance --device cpu --presets demo --measured demo --seconds 1"
    words += f" --minutes 0.2 --budget_minutes 14 --data_path {corpus} --report {tmp_path}/report"
    done = run_command([sys.executable, *words.split()], timeout=900)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.md").read_text()
    assert "failed" not in page, page
    assert json.loads((tmp_path / "report.json").read_text()).keys() == PARTS.keys()
    assert not list(ROOT.glob("gpu_report*"))
