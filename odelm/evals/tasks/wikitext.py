"""WikiText's pages: where one ends and the next begins in the published file, and the text without its token marks."""

import re
from collections.abc import Iterable, Iterator

from odelm.evals.tasks.items import Page

HEADING = re.compile(r"^ ?= [^=]+ = ?$")
"""A page's title; the titles of its sections have more equals signs on each side."""

REPLACED = (
    ("s '", "s'"),
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
ENCLOSED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
REPLACED_LAST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def pages(lines: Iterable[str]) -> Iterator[str]:
    """Yields the pages of a `wiki.*.tokens` or `wiki.*.raw` file, each from its title to the line before the next."""
    page: list[str] = []
    blank = True
    for line in lines:
        if blank and page and HEADING.match(line.rstrip("\n")):
            yield "".join(page)
            page = []
        blank = not line.strip()
        if page or not blank:
            page.append(line)
    if page:
        yield "".join(page)


def page_of(text: str) -> Page:
    """Returns a page as it is scored: detokenised, with the number of words that it had before.

    Both are as in lm-eval's task `wikitext`, version 2, whose replacements these are, in its order.
    """
    words = len(re.split(r"\s+", text))
    for old, new in REPLACED:
        text = text.replace(old, new)
    for pattern, new in ENCLOSED:
        text = re.sub(pattern, new, text)
    for old, new in REPLACED_LAST:
        text = text.replace(old, new)
    return Page(text, words)
