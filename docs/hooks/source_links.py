"""Pages may link to files outside docs/, as they do on a code host: the site carries a copy of each, as plain text.

Read by mkdocs (`hooks` in mkdocs.yml). A link to a file that does not exist stays as it is, and mkdocs reports it.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what the pages link to."""
    for page in list(files.documentation_pages()):
        for linked in _outside(page.content_string, page.src_uri):
            if files.get_file_from_path(_copy(linked)) is None:
                files.append(File.generated(config, _copy(linked), abs_src_path=str(ROOT / linked)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points the links at the copies."""
    here = str(PurePosixPath(page.file.src_uri).parent)

    def to_copy(link: re.Match[str]) -> str:
        linked = _in_repository(link[1], page.file.src_uri)
        return link[0] if linked is None else f"]({os.path.relpath(_copy(linked), here)})"

    return _LINK.sub(to_copy, markdown)


def _outside(markdown: str, page: str) -> Iterator[str]:
    for link in _LINK.finditer(markdown):
        linked = _in_repository(link[1], page)
        if linked is not None:
            yield linked


def _in_repository(link: str, page: str) -> str | None:
    """The path of a linked file from the repository's root; None if it is a page of the site, or missing."""
    path = os.path.normpath(PurePosixPath("docs", page).parent / link)
    return path if not path.startswith(("docs/", "..")) and (ROOT / path).is_file() else None


def _copy(path: str) -> str:
    """Where the site has it; the suffix lets browsers show it instead of saving it."""
    return f"source/{path}.txt"
