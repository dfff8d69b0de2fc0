"""README.md as the long description of a release, which an index page shows: relative links are dead there. setup.py calls this."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def repository(pyproject: str) -> str | None:
    """`Source` of [project.urls], if pyproject.toml has it. Python 3.10 has no parser for that format."""
    line = re.search(r'^Source = "(.*?)/?"', pyproject, re.MULTILINE)
    return line and line[1]


def with_absolute_links(markdown: str, source: str | None) -> str:
    """Relative links lead to files of the repository at `source`. Without one, a link becomes its text."""

    def absolute(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"https?://|#", target):
            return match[0]
        if source is None:
            return f"*{text}*" if mark else text  # a picture becomes its title
        return f"{mark}[{text}]({source}/{'raw' if mark else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)]+)\)", absolute, markdown)


def long_description() -> str:
    readme, pyproject = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml"))
    return with_absolute_links(readme, repository(pyproject))
