# SPDX-License-Identifier: Apache-2.0
"""Hooks of MkDocs: pages and files from outside of docs/ become part of the site, and links to them stay right.

In the repository a page links to `../benchmarks/RESULTS.md`; in the site the same file lies beside the pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ADDED = ("benchmarks/RESULTS.md", "CHANGELOG.md", "examples/*.py", "examples/*.yaml", "recipes/*.yaml")
#: Links from these pages to files that are not in the site become plain text.
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
#: Sphinx's roles in docstrings, after Markdown has made code of what they name.
_ROLE = re.compile(r":(?:class|meth|func|data|mod|attr|exc):<code>(~?)\.*([^<]*)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of :data:`ADDED`, by their paths in the repository."""
    for pattern in ADDED:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links that leave docs/ into links to what :func:`on_files` has added."""
    source = page.file.src_uri
    added = not (Path(config["docs_dir"]) / source).exists()
    here = posixpath.dirname(source if added else f"docs/{source}")

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith(("/", "mailto:")):
            return match[0]
        in_repository = posixpath.normpath(posixpath.join(here, target))
        in_site = in_repository.removeprefix("docs/")
        if files.get_file_from_path(in_site) is None:
            return text if added else match[0]  # what is wrong in a page is a warning, which --strict makes an error
        return f"[{text}]({posixpath.relpath(in_site, posixpath.dirname(source) or '.')}{anchor})"

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Shows names in docstrings without the role before them: ``Fold`` for ``:class:`~.fold.Fold```."""
    return _ROLE.sub(lambda match: f"<code>{match[2].rpartition('.')[2] if match[1] else match[2]}</code>", html)
