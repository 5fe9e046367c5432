"""A hook of MkDocs: pages link to files of the repository, which are not pages.

On a code host such a link opens the file. On the site it becomes the file's name, linked only if ``repo_url`` is set.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]\[]*)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """The page's text, with links that leave docs/ turned into links to the code host, or into names."""
    folder = posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return f"`{path}`" if text in (path, posixpath.basename(path)) else f"{text} (`{path}`)"

    return _LINK.sub(turned, markdown)
