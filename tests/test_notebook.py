"""The notebook of the guide runs, cell by cell, and what it shows is HTML."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "guide" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    scope: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(book["cells"]):
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "markdown":
            continue
        # No outputs are stored: they would be of another state of the code.
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), scope)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), scope))
    assert (tmp_path / "denoiser.onnx").stat().st_size > 1000
    score, *results = shown
    assert score > 20
    assert len(results) == 4
    for result in results:
        page = result._repr_html_()
        assert page.lstrip().startswith("<")
        assert "<html" not in page
        assert "\n" not in repr(result)
    assert "PSNR" in str(results[1]) or "psnr" in str(results[1])
