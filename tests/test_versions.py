"""Which versions are admitted, which were tried, and what is said of others."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import eval_llm
from tests.helpers import ROOT
from tests.strict import Announcement
from trainer import program
from trainer.program import untested_versions

FILES = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
LINES = [line for file in FILES for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_every_requirement_has_a_lower_and_an_upper_end(line: str) -> None:
    operators = sorted(part.operator for part in Requirement(line).specifier)
    assert operators in (["<", ">="], ["<=", ">="]), "a version that nobody tried is not admitted"


def test_what_is_installed_here_is_admitted() -> None:
    """So what the tests run with is within the ends; .ci/run has the newest, then the lowest."""
    assert [line for file in FILES for line in untested_versions(file)] == []


def write_requirements(folder: Path, *lines: str) -> Path:
    path = folder / "requirements.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_version_outside_the_range_is_named_and_what_was_tried(tmp_path: Path) -> None:
    found = metadata.version("transformers")
    higher = write_requirements(tmp_path, "torch>=1", "transformers>=99.1,<99.3")
    assert untested_versions(higher) == [
        f"warning: transformers {found} is installed, but transformers>=99.1,<99.3 was tested. If "
        f"something fails, run: pip install -r requirements.txt"
    ]
    assert untested_versions(write_requirements(tmp_path, "torch>=1,<2")) != []
    assert untested_versions(write_requirements(tmp_path, "no-such-package>=1,<2")) == []


def test_what_else_a_user_writes_into_the_file_stops_no_program(tmp_path: Path) -> None:
    more = ["", "# my own", "--extra-index-url https://example.org", "-r more.txt", "./a_package"]
    path = write_requirements(tmp_path, *more, "torch>=1,<2  # old", "tqdm")
    (line,) = untested_versions(path)
    assert line.startswith("warning: torch ")
    assert untested_versions(tmp_path / "missing.txt") == []


def test_a_build_for_a_device_counts_as_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cu130")
    assert untested_versions(write_requirements(tmp_path, "torch>=2.11,<=2.13.0")) == []
    assert untested_versions(write_requirements(tmp_path, "torch>=2.11,<=2.12.1")) != []


def test_a_program_says_so_in_one_line_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_requirements(tmp_path, "torch>=99,<100")
    monkeypatch.setattr(program, "untested_versions", lambda: untested_versions(path))
    assert eval_llm.main(["--save_dir", str(tmp_path), "--device", "cpu"]) == 4
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: torch ") and "torch>=99,<100" in warning
    assert error.startswith("error: --weight pretrain: no weights")
    monkeypatch.setenv("RANK", "1")  # the first rank speaks for all
    assert eval_llm.main(["--save_dir", str(tmp_path), "--device", "cpu"]) == 4
    assert "warning" not in capsys.readouterr().err


def test_ci_runs_the_lowest_transformers_that_is_admitted() -> None:
    lowest = next(
        part.version
        for line in LINES
        if line.startswith("transformers")
        for part in Requirement(line).specifier
        if part.operator == ">="
    )
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.search(rf"transformers=={re.escape(lowest)}\b", script)
    for name in ("model", "generation", "eval", "export", "tokenizer"):
        assert f"tests/test_{name}.py" in script


def test_what_transformers_announces_is_an_error_in_tests() -> None:
    from transformers.utils import logging

    logger = logging.get_logger("transformers.models.qwen3")
    with pytest.raises(Announcement, match="will be removed in version 6"):
        logger.warning_once("`this` is deprecated and will be removed in version 6")
    with pytest.raises(Announcement):
        logger.warning("anything")
    logger.info("nothing")
