"""What the report's tests look at: sets whose rows have labels, and a page as a tree."""

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from tiny import WORDS, save_tiny_model, some_pairs, write_rows, write_sets

NASTY = """<script>alert("1")</script>&'"""
"""A word of a reply that no page may take for its own."""
LABELS = ["harmful"] * 9 + ["benign"] * 10 + [None] * 3
"""Of the custom set's rows."""
VOID = {"meta", "input", "br", "hr", "link", "img"}


def save_reported_model(folder: Path) -> str:
    """A tiny model that knows the nasty word too."""
    return save_tiny_model(folder, [*WORDS, NASTY])


def write_labelled(folder: Path) -> dict[str, str]:
    """Writes small sets; the custom one has the labels of :data:`LABELS`, and its first row says a nasty word."""
    sets, pairs = write_sets(folder), some_pairs(len(LABELS))
    pairs[0] = (pairs[0][0], f"w1 {NASTY} w2")
    lines = ""
    for label in dict.fromkeys(LABELS):
        of_label = [pair for pair, one in zip(pairs, LABELS, strict=True) if one == label]
        fields = {} if label is None else {"label": label}
        lines += Path(write_rows(folder / "part.jsonl", of_label, source="made <here>", **fields)).read_text()
    Path(sets["custom"]).write_text(lines)
    return sets


class Page(HTMLParser):
    """A page as a tree; what was opened must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._builder, self._open = ElementTree.TreeBuilder(), []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.root = self._builder.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Opens it."""
        self._builder.start(tag, {name: value or "" for name, value in attrs})
        self._open.append(tag)
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Opens and closes it."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Closes it."""
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag
        self._builder.end(tag)

    def handle_data(self, data: str) -> None:
        """Adds it."""
        if self._open:
            self._builder.data(data)

    def all(self, tag: str, of: ElementTree.Element | None = None) -> list[ElementTree.Element]:
        """The elements of this name."""
        return list((self.root if of is None else of).iter(tag))

    def texts(self, tag: str) -> list[str]:
        """What the elements of this name say."""
        return [said(one) for one in self.all(tag)]

    def rows(self) -> dict[int, ElementTree.Element]:
        """The rows that are shown token by token, by their ids."""
        named = {said(self.all("strong", one)[0]): one for one in self.all("article")}
        return {int(name.removeprefix("row ")): one for name, one in named.items() if name.startswith("row ")}

    def exchanges(self) -> dict[str, ElementTree.Element]:
        """The prompts whose replies are shown, by their ids."""
        named = {said(self.all("strong", one)[0]): one for one in self.all("article")}
        return {name: one for name, one in named.items() if not name.startswith("row ")}

    def tokens(self, of: ElementTree.Element | None = None) -> list[ElementTree.Element]:
        """The response tokens."""
        return [one for one in (self.root if of is None else of).iter() if one.tag in ("b", "del")]


def said(element: ElementTree.Element) -> str:
    """All text in an element."""
    return "".join(element.itertext())
