"""The pages of the documentation and what is in them: fenced blocks, code in the text, tables, links, headings."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/ISSUE_TEMPLATE/*")])
PROGRAMS = ("recycled", "python", "make", "pip", "git", "pre-commit")  # of the documentation

_COMMAND = re.compile(rf"(\.venv/bin/)?({'|'.join(PROGRAMS)}) ")
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """Code of a page, which begins on `line`; `language` is that of the fence, or "" without one."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        """As the name of a test: the page and the line."""
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_command(text: str) -> bool:
    """Whether it begins with a program and a word after it: `recycled` alone is a policy, too."""
    return _COMMAND.match(text) is not None


def blocks(page: Path, *languages: str) -> list[Code]:
    """The fenced blocks of a page in these languages. One without a language is shell (`sh`) if it begins as such."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in _FENCE.finditer(text):
        code = textwrap.dedent(fence[3])
        language = fence[2] or ("sh" if is_command(code) else "")
        if language in languages:
            found.append(Code(page, text[: fence.start(3)].count("\n") + 1, language, code))
    return found


def spans(page: Path) -> list[Code]:
    """What stands between single backticks in the text, on one line each."""
    text = page.read_text(encoding="utf-8")
    prose = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    return [
        Code(page, prose[: span.start()].count("\n") + 1, "", " ".join(span[1].split()))
        for span in _SPAN.finditer(prose)
    ]


def links(page: Path) -> list[str]:
    """Targets of the links, without those on the network."""
    prose = _SPAN.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in _LINK.findall(prose) if not re.match(r"https?://|mailto:", target)]


def anchors(page: Path) -> set[str]:
    """What a link can name after `#`: headings in lower case, words joined by dashes."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", heading.lower())) for heading in headings}


def tables(page: Path) -> list[list[list[str]]]:
    """Every table as rows of cells, the header first."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found = []
    for lines in re.findall(r"(?:^\|.*\|$\n?)+", prose, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        found.append([row for row in rows if not all(re.fullmatch(r"[-: ]+", cell) for cell in row)])
    return found
