"""MkDocs hook: add the pages outside docs/ to the site, and rewrite links for the site.

README.md is the site's first page; SECURITY.md, CONTRIBUTING.md and CHANGELOG.md are pages too. Links are written for
readers of the repository. Here they are rewritten to the site's pages; links to files that are not on the site become
plain text. A notebook becomes a page of its cells, with a link to the notebook itself.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_site_links(text, page, "")))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        page = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=_notebook(path)))
    return files


def _notebook(path: Path) -> str:
    """Return the cells of a notebook as Markdown, with a link to it below the title."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]).strip() for cell in cells]
    texts = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    ]
    title, _, rest = texts[0].partition("\n")
    download = f'<a href="{path.name}" download>Download this page as a notebook.</a>'
    return "\n\n".join([title, download, rest.strip(), *texts[1:]])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/."""
    page_uri = page.file.src_uri
    if page_uri in PAGES.values() or not (ROOT / "docs" / page_uri).exists():  # made in `on_files`
        return markdown
    return _site_links(markdown, page_uri, posixpath.dirname(f"docs/{page_uri}"))


def _site_links(text: str, page: str, folder: str) -> str:
    """Rewrite links that are relative to `folder` of the repository so that they are relative to `page` of the site."""

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/").replace(".ipynb", ".md")
        elif (ROOT / path).exists():
            return found["text"]
        path = posixpath.relpath(path, posixpath.dirname(page) or ".")
        return f"{found['image']}[{found['text']}]({path}{found['anchor'] or ''})"

    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in _FENCE.split(text))
