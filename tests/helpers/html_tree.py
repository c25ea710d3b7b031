"""A page of HTML as a browser would see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "hr", "img", "wbr"}


@dataclass
class Tag:
    """An element as a browser would see it."""

    name: str
    attributes: dict[str, str]
    children: list[Tag] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join([*self.pieces, *(child.text for child in self.children)])

    def all(self, name: str, **wanted: str) -> list[Tag]:
        """Every element of that name below, in order, with these attributes (`class_` is one of its classes)."""
        found = []
        for child in self.children:
            if child.name == name and all(child.has(key, value) for key, value in wanted.items()):
                found.append(child)
            found += child.all(name, **wanted)
        return found

    def has(self, key: str, value: str) -> bool:
        given = self.attributes.get(key.rstrip("_"), "")
        return value in given.split() if key == "class_" else given == value


class Page(HTMLParser):
    """Builds the tree, and fails where it is not properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Tag("", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], [tag.name for tag in self._open]

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        tag = Tag(name, {key: value or "" for key, value in attributes})
        self._open[-1].children.append(tag)
        if name not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Tag(name, {key: value or "" for key, value in attributes}))

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop().name == name

    def handle_data(self, data: str) -> None:
        self._open[-1].pieces.append(data)
