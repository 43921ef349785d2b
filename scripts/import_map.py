"""Who may import whom, read from the imports themselves: the figure in docs/CODE.md.

    python -m scripts.import_map            # print it
    python -m scripts.import_map --write    # put it into docs/CODE.md

A file stands above all that it imports, so no arrow points up. If imports form a circle, this ends
with the names of its files.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "CODE.md"
BEGIN, END = "<!-- imports: made by scripts/import_map.py -->\n```\n", "```\n<!-- imports end -->"
PACKAGES = ("model", "dataset", "trainer", "scripts", "bench")


def imports() -> dict[str, set[str]]:
    """Each file of the programs, and those of them that it imports when it is imported."""
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


def floors(found: dict[str, set[str]]) -> list[list[str]]:
    """Files by how high they stand, the ground first."""
    left, below, levels = dict(found), set(), []
    while left:
        level = sorted(name for name, used in left.items() if used <= below)
        if not level:
            raise SystemExit(f"imports form a circle among: {', '.join(sorted(left))}")
        levels.append(level)
        below.update(level)
        left = {name: used for name, used in left.items() if name not in level}
    return levels


def figure() -> str:
    """One line for each file, the highest first: its floor, its name, what it imports."""
    found = imports()
    lines = []
    for number, level in reversed([*enumerate(floors(found), 1)]):
        for name in level:
            used = " ".join(sorted(found[name]))
            lines.append(f"{number:>2}  {name:<24} {used}".rstrip())
    return "\n".join(lines) + "\n"


def page_with(text: str) -> str:
    """docs/CODE.md with this figure."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + text + END + rest.partition(END)[2]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page_with(figure()), encoding="utf-8")
    else:
        print(figure(), end="")
