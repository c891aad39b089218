"""A web page from a seeded grammar: navigation, paragraphs, and tables of the same columns with other rows."""

import html
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recycled_jax.tasks.words import ADJECTIVES, KEYS, PLACES

TOPICS = (
    "Auction lots",
    "Museum loans",
    "Ferry parcels",
    "Workshop orders",
    "Festival stalls",
    "Harbour berths",
    "Library gifts",
    "Stable auctions",
    "Orchard leases",
    "Theatre props",
)
OWNERS = ("{name}", "{name} & Sons", "{name} & Co.", "{name}'s Heirs", "{name} (new)")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body>
<nav class="top"><ul>{links}</ul></nav>
<main>
<h1>{title}</h1>
{body}
</main>
<footer><p>Printed by the town clerk &middot; <a href="#top">back to the top</a></p></footer>
</body>
</html>"""
TITLE = "Registers of the town"
PARAGRAPH_SENTENCES = 5

_LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Kind:
    """A kind of column: its heading, a random cell, and a random condition, as words and as what a cell must meet."""

    heading: str
    cell: Callable[[np.random.Generator], str]
    condition: Callable[[np.random.Generator], tuple[str, Callable[[str], bool]]]


def _date(rng: np.random.Generator) -> str:
    return f"{rng.integers(1960, 2025)}-{rng.integers(1, 13):02}-{rng.integers(1, 29):02}"


def _before(rng: np.random.Generator) -> tuple[str, Callable[[str], bool]]:
    year = int(rng.integers(1980, 2005))
    return f"lies before the year {year}", lambda cell: int(cell[:4]) < year


def _price(rng: np.random.Generator) -> str:
    return f"${rng.integers(2, 900)}.{rng.integers(20) * 5:02}"


def _below(rng: np.random.Generator) -> tuple[str, Callable[[str], bool]]:
    most = int(rng.integers(250, 650))
    return f"is below ${most}", lambda cell: float(cell[1:]) < most


def _place(rng: np.random.Generator) -> str:
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]} {PLACES[rng.integers(len(PLACES))]}".title()


def _kind_of_place(rng: np.random.Generator) -> tuple[str, Callable[[str], bool]]:
    place = PLACES[rng.integers(len(PLACES))].title()
    return f"ends with {place}", lambda cell: cell.split()[-1] == place


def _code(rng: np.random.Generator) -> str:
    return f"{_LETTERS[rng.integers(len(_LETTERS))]}{rng.integers(100, 1000)}-{rng.integers(10, 100)}"


def _letter(rng: np.random.Generator) -> tuple[str, Callable[[str], bool]]:
    letter = _LETTERS[rng.integers(len(_LETTERS))]
    return f"begins with {letter}", lambda cell: cell[0] == letter


NAME = "Name"  # the heading of the first column
KINDS = (
    Kind("Date", _date, _before),
    Kind("Price", _price, _below),
    Kind("Place", _place, _kind_of_place),
    Kind("Code", _code, _letter),
)


def names(rng: np.random.Generator) -> Iterator[str]:
    """All names there are, some of which HTML must escape, in random order, then once more, for ever."""
    count = len(OWNERS) * len(ADJECTIVES) * len(KEYS)
    for number in itertools.cycle(rng.permutation(count).tolist()):
        rest, noun = divmod(number, len(KEYS))
        owner, adjective = divmod(rest, len(ADJECTIVES))
        yield OWNERS[owner].format(name=f"{ADJECTIVES[adjective]} {KEYS[noun]}".title())


def tsv(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A header and one line per row, cells divided by tabs, no newline at the end."""
    return "\n".join("\t".join(cells) for cells in (headings, *rows))


def row_html(cells: Sequence[str], dress: int) -> str:
    """A table row; `dress` (0 to 7) chooses the tags and attributes around its text."""
    name, *rest = (html.escape(cell) for cell in cells)
    wrap = ("{}", '<a href="#">{}</a>', "<b>{}</b>", "<span>{}</span>")[dress % 4]
    last = "<em>{}</em>" if dress == 5 else "{}"
    texts = [wrap.format(name), *rest[:-1], last.format(rest[-1])]
    opening = '<tr class="even">' if dress >= 4 else "<tr>"
    return opening + "".join(f"<td>{text}</td>" for text in texts) + "</tr>"


def table_html(topic: str, headings: Sequence[str], rows: Sequence[str]) -> str:
    """A table with a heading above it; `rows` as `row_html` makes them."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    return f'<h2>{topic}</h2>\n<table class="register">\n<tr>{head}</tr>\n' + "\n".join(rows) + "\n</table>"


def page_html(topics: Sequence[str], tables: Sequence[str], prose: Sequence[str]) -> str:
    """The whole page: the sentences of `prose` in paragraphs, shared out evenly before, between and after `tables`."""
    gaps = len(tables) + 1
    ends = [len(prose) * i // gaps for i in range(gaps + 1)]
    texts = [paragraphs_html(prose[first:last]) for first, last in itertools.pairwise(ends)]
    parts = [texts[0]]
    for table, text in zip(tables, texts[1:], strict=True):
        parts += [table, text]
    links = "".join(f'<li><a href="#">{topic}</a></li>' for topic in topics)
    return PAGE.format(title=TITLE, links=links, body="\n".join(part for part in parts if part))


def paragraphs_html(sentences: Sequence[str]) -> str:
    groups = (sentences[i : i + PARAGRAPH_SENTENCES] for i in range(0, len(sentences), PARAGRAPH_SENTENCES))
    return "\n".join(f"<p>{html.escape(' '.join(group))}</p>" for group in groups)
