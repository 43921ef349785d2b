"""The versions that the tests ran with; their one home is requirements.txt."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def untried_versions(requirements: Path = REQUIREMENTS) -> list[str]:
    """A line for each installed package whose version lies outside the range that was tried."""
    lines = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        required = Requirement(line)
        try:
            found = metadata.version(required.name)
        except metadata.PackageNotFoundError:
            continue  # whoever needs it says so
        if not required.specifier.contains(found, prereleases=True):
            lines.append(
                f"warning: {required.name} {found} is installed, but tried are {line}. If "
                f"something fails: pip install -r requirements.txt"
            )
    return lines
