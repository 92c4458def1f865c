"""The documentation site, built as `make docs` builds it: every page in a browser, every link, every public name."""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from parity_tests import public_api
from parity_tests.support import browser
from parity_tests.support.environment import PROJECT
from parity_tests.support.markdown import ROOT

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
WIDTHS = (1280, 390)  # a laptop's and a phone's

pytestmark = [
    pytest.mark.long(reason="builds the site and opens its pages in a browser"),
    pytest.mark.skipif(not MKDOCS.exists(), reason="not run: `make docs` has made no .venv-docs"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Page(HTMLParser):
    """The addresses that a page links and loads, and the ids that links can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script") and "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(given["href"])


read = cache(Page)


def pages(site: Path) -> list[Path]:
    found = sorted(site.rglob("index.html"))
    assert len(found) >= 25
    return found


def broken(page: Path, link: str, site: Path) -> bool:
    address, anchor = urldefrag(link)
    target = page.parent if not address else (page.parent / unquote(address)).resolve()
    if not address:
        target = page
    elif target.is_dir():
        target /= "index.html"
    return not target.is_file() or site not in target.parents or (bool(anchor) and anchor not in read(target).ids)


def test_no_link_within_the_site_is_broken(site: Path) -> None:
    wrong = [
        f"{page.relative_to(site)}: {link}"
        for page in pages(site)
        for link in read(page).links
        if not re.match(r"https?:|mailto:", link) and broken(page, unquote(link), site)
    ]
    assert wrong == []


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in pages(site):
        loaded = read(page).loaded
        assert loaded
        assert [link for link in loaded if re.match(r"(https?:)?//", link)] == []
        assert [link for link in loaded if broken(page, link, site)] == []


def test_links_out_of_the_docs_lead_to_files_of_the_repository(site: Path) -> None:
    address = re.compile(rf"{re.escape(PROJECT['urls']['Repository'])}/(?:blob|tree)/main/([^#]*)")
    links = [link for page in pages(site) for link in read(page).links]
    files = {match[1] for link in links if (match := address.match(link))}
    assert len(files) >= 5
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_public_name_has_its_place_in_the_reference(site: Path) -> None:
    ids = set().union(*(read(page).ids for page in (site / "reference").rglob("index.html")))
    ids |= {name.replace("outlook_common.config.", "outlook_common.") for name in ids}
    constant = re.compile(r"(.*\.)?([A-Z_]+|__version__)")
    wanted = [name for name in public_api.public_names() if not constant.fullmatch(name)]
    assert len(wanted) >= 70
    assert [name for name in wanted if name not in ids] == []


@pytest.mark.skipif(browser.absence() is not None, reason=str(browser.absence()))
def test_every_page_opens_on_a_laptop_and_a_phone_without_errors_and_fits(
    site: Path, address: str, tmp_path: Path
) -> None:
    with browser.chromium(tmp_path / "profile") as window:
        for page in pages(site):
            path = page.parent.relative_to(site).as_posix()
            for width in WIDTHS:
                window.resize(width, 900)
                window.open(f"{address}/{'' if path == '.' else f'{path}/'}")
                assert window.run("return document.documentElement.scrollWidth") <= width, (path, width)
                assert window.run("return document.querySelectorAll('.md-content h1').length") == 1, path
                assert window.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)"), path
            assert window.errors() == [], path
