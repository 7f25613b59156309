"""The documentation site: every public name is in it, and its pages are well seen in a browser."""

import functools
import http.server
import importlib
import json
import os
import re
import threading
import time
import types
from pathlib import Path
from urllib.parse import urldefrag

import pytest
from browser import chromium, find_chromium, screenshot

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
LONGEST_WAIT = 20
LARGEST_PICTURE = 200 * 1024

# What a page has: where its links lead, what links may lead to, and whether something of it is wider than the window.
LOOK = """
return {
  links: [...document.links].map(link => link.href),
  anchors: [...document.querySelectorAll("[id]")].map(element => element.id),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
}
"""


def public_names(name):
    module = importlib.import_module(name)
    values = {public: getattr(module, public) for public in module.__all__}
    return {f"{name}.{public}" for public, value in values.items() if not isinstance(value, types.ModuleType)}


@pytest.mark.parametrize("name", ["moelora", "moelora.experts", "moelora.routing", "moelora.training"])
def test_every_public_name_is_in_the_reference(name):
    page = (ROOT / "docs" / "api" / f"{name.rpartition('.')[2]}.md").read_text(encoding="utf-8")
    described = re.findall(r"^\.\. (?:autoclass|autoexception|autofunction|data):: ([\w.]+)", page, re.MULTILINE)
    described = {entry if "." in entry else f"{name}.{entry}" for entry in described}
    assert public_names(name) - described == set()


def test_what_the_reference_takes_of_the_report_is_there():
    page = (ROOT / "docs" / "api" / "report.md").read_text(encoding="utf-8")
    (members,) = re.findall(r":members: (.+)", page)
    analysis = importlib.import_module("moelora.report.analysis").Analysis
    assert set(members.split(", ")) == {name for name in vars(analysis) if not name.startswith("_")}


def test_pictures_are_small():
    pictures = {path.name: path.stat().st_size for path in (ROOT / "docs").rglob("*.png")}
    assert pictures and max(pictures.values()) < LARGEST_PICTURE, pictures


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Where a server has the built site. Skips without one, except on CI, which builds it first."""
    find_chromium()
    if not (SITE / "index.html").exists():
        reason = f"there is no {SITE.relative_to(ROOT)}; `make docs` builds it"
        if os.environ.get("MOELORA_NEEDS_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def phone(tmp_path_factory, address):
    with chromium(tmp_path_factory.mktemp("phone"), width=390, height=844) as driver:
        yield driver


@pytest.fixture(scope="module")
def seen(phone, address):
    """What LOOK finds, by page, on a phone; and what the browser asked for and complained of on the way."""
    log_of(phone)  # what the browser's first, empty page asked for
    found = {}
    for path in sorted(SITE.rglob("*.html")):
        page = address + path.relative_to(SITE).as_posix()
        phone.get(page)
        found[page] = phone.execute_script(LOOK)
    return found, *log_of(phone)


def log_of(driver):
    """Addresses that were asked for since the last call, and complaints."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return asked, [entry["message"] for entry in driver.get_log("browser")]


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(seen):
    pages, _, _ = seen
    assert len(pages) > 20
    assert {page: look["overflow"] for page, look in pages.items() if look["overflow"] > 0} == {}


@pytest.mark.slow
def test_pages_need_no_network_and_have_nothing_to_complain_of(seen, address):
    _, asked, complaints = seen
    assert asked and [url for url in asked if not url.startswith((address, "data:"))] == []
    assert complaints == []


@pytest.mark.slow
def test_links_lead_somewhere(seen, address):
    pages, _, _ = seen
    links = {(page, *urldefrag(link)) for page, look in pages.items() for link in look["links"]}
    inside = [link for link in links if link[1].startswith(address)]
    assert len(inside) > 1000
    lost = []
    for page, target, anchor in inside:
        target += "index.html" if target == address else ""
        if target in pages:
            is_there = not anchor or anchor in pages[target]["anchors"]
        else:
            is_there = (SITE / target.removeprefix(address)).is_file()
        if not is_there:
            lost.append((page, target, anchor))
    assert lost == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pictures_of_the_main_pages(address, tmp_path, dark):
    with chromium(tmp_path, dark=dark) as driver:
        for page in ("index", "quickstart", "compare", "experts-grow", "configuration", "api/experts"):
            driver.get(f"{address}{page}.html")
            screenshot(driver, f"site-{'dark' if dark else 'light'}-{page.replace('/', '-')}")
            background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", background)[:3])) < 64) == dark


@pytest.mark.slow
def test_search_finds_a_word(phone, address):
    phone.get(f"{address}search.html?q=perplexity")
    deadline = time.monotonic() + LONGEST_WAIT
    results = []
    while not results and time.monotonic() < deadline:
        time.sleep(0.05)
        results = phone.execute_script(
            "return [...document.querySelectorAll('#search-results li > a')].map(link => link.href)"
        )
    assert any("training.html" in result or "quickstart.html" in result for result in results), results
