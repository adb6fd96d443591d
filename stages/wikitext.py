"""Plain text from MediaWiki markup: enough for training text, not a parser."""

from __future__ import annotations

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

_DROP = re.compile(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|timeline|source|pre|code)\b.*?</\1>", re.S)
_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
_FILES = re.compile(r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)?):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_OUTER = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_HEADING = re.compile(r"^=+ *(.*?) *=+$", re.M)
_END = re.compile(r"^== *(References|External links|See also|Further reading|Notes|Bibliography) *==.*", re.M | re.S)


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every article in a bz2 dump; redirects and other namespaces are left out."""
    with bz2.open(dump) as file:
        title, namespace = "", ""
        for _, element in ElementTree.iterparse(file):
            tag = element.tag.rsplit("}", 1)[-1]
            if tag == "title":
                title = element.text or ""
            elif tag == "ns":
                namespace = element.text or "0"
            elif tag == "text":
                text = element.text or ""
                if namespace in ("", "0") and not text.lstrip().lower().startswith("#redirect"):
                    yield title, plain(text)
                element.clear()


def plain(markup: str) -> str:
    """The article's prose: no templates, tables, references or link targets."""
    text = _END.sub("", _DROP.sub("", markup))
    # templates nest: peel them from the inside
    for _ in range(12):
        text, count = _INNERMOST.subn("", text)
        if not count:
            break
    text = _LINK.sub(r"\1", _FILES.sub("", text))
    text = _TAG.sub("", _OUTER.sub(r"\1", text))
    text = _HEADING.sub(r"\1", text.replace("'''", "").replace("''", ""))
    lines = (line.lstrip("*#:; ").rstrip() for line in html.unescape(text).splitlines())
    kept = [line for line in lines if not line.startswith(("|", "{|", "!", "}}", "{{"))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
