"""What a release shows and holds: docs/long_description.py and the metadata."""

from __future__ import annotations

import runpy

import pytest

import syncbn
from support import ROOT

pytestmark = pytest.mark.world_size(1)
FUNCTIONS = runpy.run_path(str(ROOT / "docs/long_description.py"))
MARKDOWN = "See [the docs](docs/faults.md#seen), [torch](https://pytorch.org), [below](#speed).\n![A picture](docs/segmentation.png)"


def test_links_of_the_long_description_lead_to_the_repository():
    want = MARKDOWN.replace("(docs/faults", "(https://host/us/syncbn/blob/HEAD/docs/faults")
    want = want.replace("(docs/seg", "(https://host/us/syncbn/raw/HEAD/docs/seg")
    assert FUNCTIONS["with_absolute_links"](MARKDOWN, "https://host/us/syncbn") == want


def test_without_an_address_relative_links_become_text():
    want = "See the docs, [torch](https://pytorch.org), [below](#speed).\n*A picture*"
    assert FUNCTIONS["with_absolute_links"](MARKDOWN, None) == want


@pytest.mark.parametrize(
    "pyproject,address",
    [
        ("[project.urls]\nSource = 'no'\n", None),
        ('[project]\nname = "x"\n', None),
        ('[project.urls]\nSource = "https://host/us/syncbn/"\n', "https://host/us/syncbn"),
    ],
    ids=["single quotes", "absent", "present"],
)
def test_the_address_is_that_of_the_project_urls(pyproject, address):
    assert FUNCTIONS["repository"](pyproject) == address


def test_the_version_stands_in_one_place():
    files = [ROOT / name for name in ("pyproject.toml", "setup.cfg", "setup.py", "CITATION.cff", "syncbn/__init__.py")]
    assert [path.name for path in files if syncbn.__version__ in path.read_text()] == ["__init__.py"]
