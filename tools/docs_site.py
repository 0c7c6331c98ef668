"""MkDocs hook: pages of the repository that stand outside docs/, and links between the two.

README.md is the site's first page; CONTRIBUTING.md and CHANGELOG.md have pages of their own. A link
to any other file of the repository becomes a copy of that file within the site, so that records and
pictures open there too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/, and the files that any page links to."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    pages = list(files.documentation_pages())
    for page in pages:  # grows: what a page links to may be a page with links of its own
        for match in _LINK.finditer(page.content_string):
            path = _in_repository(page.src_uri, match[2])
            uri = _in_site(path)
            if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                added = File.generated(config, uri, abs_src_path=str(ROOT / path))
                files.append(added)
                pages += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[2])
        if not (ROOT / path).exists():
            return match[0]
        return match[1] + posixpath.relpath(_in_site(path), here or ".") + match[3]

    return _LINK.sub(moved, markdown)


def _in_repository(page: str, link: str) -> str:
    """Resolve a link as it stands in the page's file in the repository."""
    sources = {uri: source for source, uri in PAGES.items()}
    in_docs = (ROOT / "docs" / page).is_file()
    source = sources.get(page) or (f"docs/{page}" if in_docs else page)
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(path: str) -> str:
    """Name the place of a repository's file within the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else path)
