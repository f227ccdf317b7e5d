"""Check the built site: `python docs/check_links.py docs/_build/html`.

Reports links to missing pages or anchors, and filler that autodoc writes where a docstring is missing.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collect the tag's links and anchors."""
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Links to missing files or anchors of the site, with the pages that have them."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


EMPTY = ("See the class", "Alias for field number", "&lt;function", "&lt;lambda")


def empty_words(site: Path) -> list[str]:
    """Filler that autodoc writes where a docstring is missing, with the pages that have it."""
    return [
        f"{path.relative_to(site)}: {words}"
        for path in site.rglob("*.html")
        if "_modules" not in path.parts  # source code
        for words in EMPTY
        if words in path.read_text(encoding="utf-8")
    ]


if __name__ == "__main__":
    site = Path(sys.argv[1])
    found = broken_links(site) + empty_words(site)
    print("\n".join(found) or "no broken links, no empty words")
    sys.exit(bool(found))
