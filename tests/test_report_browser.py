"""The report as a reader sees it, in a real headless Chromium: what is drawn, by whom it can be read, how fast."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from browser import chromium, find_chromium, screenshot
from test_analysis import TEXTS, analyze, tiny

from moelora.report.advice import Suggestion
from moelora.report.measure import TokenView
from moelora.report.page import About, render

pytestmark = pytest.mark.slow

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'
ABOUT = About("adapter <b>bold</b>", "base", "learned, per block")
SECTIONS = ("tokens", "map", "specialisation", "training", "alike", "worth")
LONGEST_WAIT = 20


def log(steps=6):
    """A Trainer's log in which expert 0 takes over, with maturity and certainty growing."""

    def values(step):
        load = [0.1 + 0.05 * step, 0.2, 0.3, 0.4 - 0.05 * step]
        return {"expert_load": load, "maturity": [0.1 * step * k / 4 for k in range(4)], "entropy": 1.3 - 0.1 * step,
                "top1_probability": 0.5, "dropped": 0.0, "balancing_loss": 1.0}  # fmt: skip

    routers = ("model.layers.0", "model.layers.1")
    return [{"step": 10 * (i + 1), "loss": 2.0, "routers": dict.fromkeys(routers, values(i))} for i in range(steps)]


@pytest.fixture(scope="module")
def found():
    find_chromium()
    texts = {"small": [*TEXTS["small"], f"naïve 🙂\n\ttab {HOSTILE}"], "LOUD": TEXTS["LOUD"]}
    found = analyze(tiny(), texts, log_history=log())
    advice = [Suggestion("prune", (3,), "because <i>so</i>"), Suggestion("merge", (0, 1), "alike")]
    return replace(found, suggestions=advice)


def write(found, folder):
    path = folder / "report.html"
    path.write_text(render(found, ABOUT, 50), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    return write(found, tmp_path_factory.mktemp("page"))


def ready(driver, what=""):
    deadline = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < deadline:
        state = driver.execute_script("return document.documentElement.dataset.ready || ''")
        if state and state.startswith(what):
            return
        time.sleep(0.02)
    pytest.fail(f"the page is not ready ({state!r}): {driver.get_log('browser')}")


def opened(driver, page):
    driver.get(page.as_uri())
    ready(driver)
    return driver


@pytest.fixture(scope="module")
def desk(page, tmp_path_factory):
    """A desktop window, light, shared by the tests that only look and choose."""
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield opened(driver, page)


@pytest.fixture
def view(desk, page):
    return opened(desk, page)


def each(driver, selector, expression):
    """The JavaScript expression, of n, for every node that the selector finds."""
    return driver.execute_script(
        f"return [...document.querySelectorAll(arguments[0])].map((n) => {expression})", selector
    )


def all_text(driver, selector):
    return each(driver, selector, "n.textContent")


def numbers(driver, selector):
    """The numbers in these nodes' texts: percentages and signed decimals."""
    return [float(text.strip("%").replace("\u2212", "-")) for text in all_text(driver, selector) if text]


def choose(driver, control, value):
    script = "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
    driver.execute_script(script + "s.dispatchEvent(new Event('change'))", control, str(value))


def chosen_router(driver):
    return int(driver.execute_script("return document.getElementById('router').value"))


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


# What is drawn


def test_tokens_wear_their_experts(view, found):
    for domain in (0, 1):
        choose(view, "domain", domain)
        for router in (0, 1):
            choose(view, "router", router)
            ready(view, f"{domain}/{router}/0")
            drawn = each(view, "#text .token", "[+n.dataset.expert, n.textContent]")
            tokens = found.tokens[domain]
            assert [expert for expert, _ in drawn] == tokens.weights[router].argmax(-1).tolist()
            shown = [text.replace("\u2060·", "") for _, text in drawn]
            assert shown == tokens.pieces
    computed = "[n.dataset.expert, getComputedStyle(n).borderBottomColor + getComputedStyle(n).borderBottomStyle]"
    styles = dict(each(view, ".token", computed))
    assert len(set(styles.values())) == len(styles) > 1, "experts differ in colour and line"
    legend = [text.removeprefix(f"expert {i}") for i, text in enumerate(all_text(view, "#legend .chip"))]
    shares = np.bincount(found.tokens[1].weights[1].argmax(-1), minlength=4) / found.num_tokens[1]
    assert legend == [f"{100 * share:.0f}%" for share in shares]


def test_a_tooltip_tells_a_tokens_weights(view, found):
    view.execute_script("point(5)")
    router = chosen_router(view)
    assert all_text(view, "#tip .weight span:first-child") == ["E0", "E1", "E2", "E3"]
    expected = found.tokens[0].weights[router, 5] / 2.55
    assert numbers(view, "#tip .weight span:last-child") == pytest.approx(expected, abs=0.51)
    tip = view.find_element("id", "tip").text
    assert f"loss {found.tokens[0].losses[5]:.2f}"[:-1] in tip and found.routers[router] in tip
    view.execute_script("point(0)")
    assert "not predicted" in view.find_element("id", "tip").text


def test_the_map_shows_every_share(view, found):
    for measure in ("weight", "load"):
        choose(view, "measure", measure)
        assert numbers(view, "#maps td") == pytest.approx(100 * getattr(found, measure).ravel(), abs=0.52)
    assert all_text(view, "#maps caption") == found.domains
    view.find_elements("css selector", "#maps th button")[1].click()
    ready(view, "0/1/")
    assert chosen_router(view) == 1
    assert all_text(view, "#maps tr.chosen th") == ["1", "1"]
    assert all_text(view, "#matrices caption")[0].endswith("model.layers.1")
    shown = numbers(view, "#matrices > :first-child td")
    assert shown == pytest.approx(100 * found.load[:, 1].ravel(), abs=0.06)


def test_information_is_drawn_beside_chance(view, found):
    special = found.specialisation
    dots = view.find_elements("css selector", "#information .dot")
    bands = each(view, "#information .band", "[+n.getAttribute('y1'), +n.getAttribute('y2')]")
    assert len(dots) == len(bands) == 2
    for router, dot in enumerate(dots):
        inside = special.observed[router] <= special.high[router]
        assert ("inside" in dot.get_attribute("class").split()) == inside
        assert (float(dot.get_attribute("cy")) >= bands[router][1] - 1e-6) == inside
    view.execute_script("document.querySelector('#specialisation details').open = true")
    rows = all_text(view, "#information-table tbody tr")
    assert len(rows) == 3 and f"{special.observed[-1]:.4f}" in rows[-1] and f"{special.chance[0]:.4f}" in rows[0]


def test_training_is_drawn_from_the_log(view):
    points = "[...n.querySelectorAll('polyline')].map((p) => p.getAttribute('points').split(' ').length)"
    curves = each(view, "#curves figure", points)
    assert curves == [[6] * 4, [6], [6] * 4]
    dashes = each(view, "#curves figure:first-child polyline", "n.getAttribute('stroke-dasharray')")
    assert len(set(dashes)) == 4
    rising = each(view, "#curves polyline", "n.getAttribute('points')")[0].split()
    heights = [float(point.split(",")[1]) for point in rising]
    assert heights == sorted(heights, reverse=True), "expert 0's load rises"
    choose(view, "training-of", "mean")
    assert "mean of 2 routers" in all_text(view, "#curves figcaption")[0]


def test_likeness_and_suggestions_are_shown(view, found):
    expected = [float(found.whole.similarity[i, j]) for i in range(4) for j in range(4) if i != j]
    assert numbers(view, "#similarity > :first-child td") == pytest.approx(expected, abs=0.006)
    advice = ["Prune expert 3because <i>so</i>", "Merge experts 0 and 1alike"]
    assert all_text(view, "#suggestions .suggestion") == advice


def test_worth_is_drawn_to_scale(view, found):
    bars = each(view, "#worths rect", "[+n.dataset.worth, +n.getAttribute('width')]")
    assert [worth for worth, _ in bars] == pytest.approx(np.round(found.worth, 5).ravel().tolist())
    scale = [width / abs(worth) for worth, width in bars if abs(worth) > 1e-3]
    assert scale == pytest.approx([scale[0]] * len(scale), rel=1e-3)
    assert len(view.find_elements("css selector", "#worths .whisker")) == 8


# Whom it serves


def test_an_expert_can_be_seen_alone(view, found):
    view.find_elements("css selector", "#legend .chip")[1].click()
    router = chosen_router(view)
    others = (found.tokens[0].weights[router].argmax(-1) != 1).sum()
    assert len(view.find_elements("css selector", ".token.off")) == others
    view.find_elements("css selector", "#legend .chip")[1].click()
    assert not view.find_elements("css selector", ".token.off")


def test_it_can_be_used_by_keyboard(view):
    from selenium.webdriver.common.keys import Keys

    view.execute_script("document.getElementById('text').focus()")
    press(view, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert view.execute_script("return document.querySelector('.token.on').dataset.token") == "1"
    assert view.find_element("id", "tip").is_displayed()
    assert view.execute_script("return document.getElementById('text').getAttribute('aria-activedescendant')") == "t1"
    press(view, Keys.ESCAPE)
    assert not view.find_element("id", "tip").is_displayed()
    press(view, "[")
    ready(view, "0/0/")
    press(view, "]")
    ready(view, "0/1/")
    view.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(40):
        press(view, Keys.TAB)
        reached.add(view.execute_script("return document.activeElement.id || document.activeElement.className"))
    assert {"domain", "router", "text", "measure", "numbers", "chip", "training-of"} <= reached


def test_expert_numbers_can_stand_beside_the_text(view, found):
    view.find_element("id", "numbers").click()
    beside = all_text(view, ".token sub")
    assert beside == [str(e) for e in found.tokens[0].weights[chosen_router(view)].argmax(-1)]


def test_hostile_text_is_shown_and_not_run(view):
    assert view.title == "adapter <b>bold</b> · what the experts do"
    assert HOSTILE in "".join(all_text(view, "#text .token"))
    assert not view.find_elements("css selector", "main img, .where b b, .suggestion i")


def test_nothing_is_fetched_and_nothing_goes_wrong(tmp_path, page):
    with chromium(tmp_path) as driver:
        opened(driver, page)
        requested = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = {m["params"]["request"]["url"] for m in requested if m["method"] == "Network.requestWillBeSent"}
        # Besides the browser's own new-tab page.
        assert {url for url in urls if not url.startswith(("chrome", "data:"))} == {page.as_uri()}
        assert driver.get_log("browser") == []


@pytest.mark.parametrize(
    ("name", "width", "height", "dark"),
    [
        ("light", 1280, 900, False),
        ("dark", 1280, 900, True),
        ("phone", 390, 844, False),
        ("phone-dark", 360, 740, True),
    ],
)
def test_it_fits_every_screen(tmp_path, page, name, width, height, dark):
    with chromium(tmp_path, width, height, dark) as driver:
        opened(driver, page)
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert max(each(driver, "svg text", "n.getBoundingClientRect().height")) < 30, "letters blown up"
        background, ink = driver.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map((c) => "
            "c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765)"
        )
        assert (background < 0.2 and ink > 0.8) if dark else (background > 0.8 and ink < 0.2)
        screenshot(driver, f"report-{name}-top")
        for section in SECTIONS:
            driver.execute_script("document.getElementById(arguments[0]).scrollIntoView()", section)
            if section == "tokens":
                driver.execute_script("document.getElementById('text').focus({preventScroll: true}); point(12)")
            screenshot(driver, f"report-{name}-{section}")
            box = driver.find_element("id", section).rect
            assert box["width"] > 300 and box["height"] > 100
            driver.execute_script("hideTip()")


# Without something


def test_what_is_missing_is_said(tmp_path, found):
    plain = replace(found, history=None, worth=None, worth_error=None, specialisation=None, suggestions=[])
    with chromium(tmp_path / "profile") as driver:
        opened(driver, write(plain, tmp_path))
        for place, words in (("training-lead", "MoELoraCallback"), ("worth-lead", "was not measured"),
                             ("specialisation-lead", "two domains"), ("suggestions", "Keep them all")):  # fmt: skip
            assert words in driver.find_element("id", place).text
        assert driver.get_log("browser") == []


# Size


def test_a_hundred_thousand_tokens_stay_quick(tmp_path, found):
    generator = np.random.default_rng(0)
    routers, tokens, experts = 30, 100_000, 8
    weights = generator.dirichlet([0.5] * experts, (routers, tokens)) * 255
    view = TokenView(
        pieces=[f" word{i}" for i in generator.integers(0, 5000, tokens)],
        documents=np.repeat(np.arange(200, dtype=np.int32), tokens // 200),
        weights=weights.astype(np.uint8),
        losses=generator.gamma(2.0, 1.0, tokens).astype(np.float32),
    )
    large = replace(
        found, domains=["large"], experts=["default"] * experts, routers=[f"model.layers.{i}" for i in range(routers)],
        num_tokens=[tokens], num_documents=[200], left_out=[0], is_held_out=[True], tokens=[view], specialisation=None,
        weight=weights.mean(1)[None] / 255, load=weights.mean(1)[None] / 255, loss=found.loss[:1], worth=None,
        worth_error=None, worth_tokens=[0], maturity=np.ones((routers, experts)), history=None, suggestions=[],
        by_router=dict.fromkeys((f"model.layers.{i}" for i in range(routers)), found.whole),
    )  # fmt: skip
    page = write(large, tmp_path)
    assert page.stat().st_size < 40e6
    with chromium(tmp_path / "profile") as driver:
        start = time.monotonic()
        opened(driver, page)
        assert time.monotonic() - start < LONGEST_WAIT
        assert len(driver.find_elements("css selector", ".token")) == 1500
        start = time.monotonic()
        choose(driver, "router", 29)
        ready(driver, "0/29/0")
        driver.execute_script("point(99999)")
        ready(driver, "0/29/66")
        assert time.monotonic() - start < LONGEST_WAIT / 2
        assert driver.execute_script("return document.querySelector('.token.on').dataset.token") == "99999"
        assert len(driver.find_elements("css selector", ".token")) == 1000
        expert = driver.execute_script("return +document.querySelector('.token.on').dataset.expert")
        assert expert == view.weights[29, -1].argmax()
        assert "Page 67 of 67" in driver.find_element("id", "page").text
        screenshot(driver, "report-100k")
