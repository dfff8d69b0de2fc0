"""Hooks of mkdocs: the README is the first page, and links to files outside docs/ lead to the repository, or become text."""

import re
import runpy
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINKS = runpy.run_path(str(ROOT / "docs/long_description.py"))


def on_files(files, config):
    """README.md as index.md. Its links to docs/ are the site's."""
    readme = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=_outside(readme, "")))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown if page.file.src_uri == "index.md" else _outside(markdown.replace("](../README.md", "](index.md"), "../")


def _outside(markdown: str, prefix: str) -> str:
    """Makes the links absolute that begin with `prefix` and lead to no page of the site."""

    def absolute(match: re.Match[str]) -> str:
        target = match[1].partition("#")[0]
        if not target.startswith(prefix) or ((ROOT / "docs" / target).exists() and not prefix):
            return match[0]
        return LINKS["with_absolute_links"](match[0].replace(f"]({prefix}", "]("), source)

    source = LINKS["repository"]((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return re.sub(r"!?\[[^]]*\]\((?!https?://|#)([^)]+)\)", absolute, markdown)
