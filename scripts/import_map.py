"""The import map in docs/CODE.md: which file imports which, read from the source.

    python -m scripts.import_map            # print it
    python -m scripts.import_map --write    # update docs/CODE.md

Each file has a level above those of all files that it imports. If imports are circular, the program
exits with the names of the files involved.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "CODE.md"
BEGIN, END = "<!-- imports: made by scripts/import_map.py -->\n```\n", "```\n<!-- imports end -->"
PACKAGES = ("model", "dataset", "trainer", "scripts", "bench")


def imports() -> dict[str, set[str]]:
    """Each module of this repository, and those that it imports at its top level."""
    files = [*ROOT.glob("*.py"), *(f for p in PACKAGES for f in (ROOT / p).rglob("*.py"))]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    found: dict[str, set[str]] = {}
    for name, file in names.items():
        used: set[str] = set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = used & names.keys()
    return found


def levels_of(found: dict[str, set[str]]) -> list[list[str]]:
    """The modules of each level, the lowest first."""
    left, below, levels = dict(found), set(), []
    while left:
        level = sorted(name for name, used in left.items() if used <= below)
        if not level:
            raise SystemExit(f"circular imports among: {', '.join(sorted(left))}")
        levels.append(level)
        below.update(level)
        left = {name: used for name, used in left.items() if name not in level}
    return levels


def figure() -> str:
    """A line per module, the highest level first: its level, its name, what it imports."""
    found = imports()
    lines = []
    for number, level in reversed([*enumerate(levels_of(found), 1)]):
        for name in level:
            used = " ".join(sorted(found[name]))
            lines.append(f"{number:>2}  {name:<24} {used}".rstrip())
    return "\n".join(lines) + "\n"


def page_with(text: str) -> str:
    """The content of docs/CODE.md with this figure."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + text + END + rest.partition(END)[2]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page_with(figure()), encoding="utf-8")
    else:
        print(figure(), end="")
