"""Print the lower bounds of pyproject.toml as constraints for pip: `torch>=2.9` becomes `torch==2.9`.

python .ci/lower_bounds.py > build/lower_bounds.txt
pip install --constraint build/lower_bounds.txt --editable '.[dev]'
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# A test runner or linter of any age would do: what matters is what the package itself runs with.
TOOLS = {"pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "playwright", "ruff", "mypy", "pre-commit"}
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?>=(?P<bound>[\w.]+)")


def lower_bounds(path: Path = PYPROJECT) -> Iterator[str]:
    """`name==bound` of every dependency and of those of the extras, each once; raises ValueError for other forms."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in dict.fromkeys([*project["dependencies"], *(text for extra in extras.values() for text in extra)]):
        found = REQUIREMENT.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not of the form name>=bound")
        if found["name"] not in TOOLS:
            yield f"{found['name']}=={found['bound']}"


if __name__ == "__main__":
    print("\n".join(sorted(lower_bounds())))
