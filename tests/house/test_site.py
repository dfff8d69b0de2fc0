"""The documentation builds strictly as a site, no link within it is dead, and a browser draws its first page."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from support import ROOT

pytestmark = pytest.mark.world_size(1)

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SIZE = (1280, 1800)  # pixels


class Page(HTMLParser):
    """The links, anchors and headings of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.headings = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.headings += tag == "h1"
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [value for name in ("href", "src") if (value := values.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="needs `pip install --group docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_document_is_a_page_with_one_heading(site):
    names = {path.stem for path in ROOT.glob("docs/*.md")}
    assert {path.parent.name for path in site.glob("*/index.html")} == names
    assert {path.parent.name: Page(path).headings for path in site.rglob("index.html")} == dict.fromkeys(names | {site.name}, 1)


def test_every_document_is_in_the_navigation():
    listed = set(re.findall(r"(\w+)\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {"index", *(path.stem for path in ROOT.glob("docs/*.md"))}


def test_no_link_is_dead(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, anchor = urldefrag(unquote(link))
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (anchor and file in pages and anchor not in pages[file].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert len(pages) > 10 and dead == []


def test_no_page_asks_another_server(site):
    """For fonts, scripts or pictures: the site works offline, and no server learns who reads it."""
    pattern = r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"'
    asked = {url for path in site.rglob("*.html") for url in re.findall(pattern, path.read_text())}
    assert asked == set()


@pytest.mark.skipif(BROWSER is None, reason="needs chromium on PATH (apt-get install chromium)")
def test_a_browser_draws_the_first_page(site, tmp_path):
    """At its size, with text and pictures: of an empty page, no row has more than a few different bytes."""
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile"]
    options += [f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=5000", f"--screenshot={shot}"]
    subprocess.run([str(BROWSER), *options, (site / "index.html").as_uri()], check=True, capture_output=True, timeout=90)
    rows = pixel_rows(shot.read_bytes())
    assert len(rows) == SIZE[1]
    drawn = sum(len(set(row)) > 30 for row in rows)
    assert drawn > SIZE[1] / 4, f"an empty page: {drawn} rows"


def pixel_rows(png: bytes) -> list[bytes]:
    """The filtered bytes of each row of an 8-bit PNG."""
    width, height, bits, colour = struct.unpack(">IIBB", png[16:26])
    assert (width, bits) == (SIZE[0], 8) and colour in (2, 6)
    data, at = b"", 8
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    raw, stride = zlib.decompress(data), width * (3 if colour == 2 else 4) + 1
    return [raw[row * stride : (row + 1) * stride] for row in range(height)]
