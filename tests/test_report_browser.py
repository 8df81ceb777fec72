"""A report in headless Chromium: it draws, picks, sorts, fits a phone and paper, runs no markup."""

import base64
import re
import time
from pathlib import Path

import pytest
from report_fixtures import EVIL, ladder_rows, write_rows, write_run

from gpt_jax.reports.report import write_report

pytestmark = pytest.mark.browser

DRIVER, BROWSER = Path("/usr/bin/chromedriver"), Path("/usr/bin/chromium")
WIDE, PHONE = 1200, 360


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (DRIVER.exists() and BROWSER.exists()):
        pytest.skip(f"needs {BROWSER} and {DRIVER}")
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A page about 30 runs."""
    folder = tmp_path_factory.mktemp("ladder")
    path = write_rows(folder / "ledger.jsonl", ladder_rows())
    return write_report([str(path)], folder / "report.html", f"A ladder {EVIL}")[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A page about two run directories, few enough for a legend."""
    folder = tmp_path_factory.mktemp("pair")
    write_run(folder, "narrow")
    write_run(folder, f"wide {EVIL.replace('/', '')}", embed_dim=64)
    return write_report([str(folder)], folder / "report.html")[0]


class Page:
    """A report in a browser of some width."""

    def __init__(self, driver, path, width=WIDE, height=800):
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get(Path(path).as_uri())
        wait(lambda: self.js("return document.querySelectorAll('.plot .main-svg').length > 0"))

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def shown(self, key="loss_by_tokens"):
        """Names of the runs that a figure shows."""
        return self.js(
            "return [...new Set(document.getElementById(arguments[0]).data"
            ".filter((t) => t.meta && t.visible !== 'legendonly').map((t) => t.meta))]", key
        )  # fmt: skip

    def click(self, selector):
        self.js("document.querySelector(arguments[0]).click()", selector)

    def log(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


def wait(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_figure_is_drawn_and_nothing_is_asked_or_run(ladder, chromium):
    page = Page(chromium, ladder)
    empty = page.js(
        "return [...document.querySelectorAll('.plot')].filter((p) => "
        "!p.querySelector('.scatterlayer path')).map((p) => p.id)"
    )
    assert page.js("return document.querySelectorAll('.plot').length") >= 2 and not empty
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    assert page.js("return window.hit") is None
    assert page.js("return document.querySelector('h1').textContent") == f"A ladder {EVIL}"
    assert not page.log()


def test_markup_that_slipped_through_would_not_run(ladder, tmp_path, chromium):
    markup = ladder.read_text().replace("<h1>", f"{EVIL}<img src=x onerror='window.hit=2'><h1>")
    (tmp_path / "evil.html").write_text(markup)
    page = Page(chromium, tmp_path / "evil.html")
    assert page.js("return window.hit") is None
    assert len(page.shown()) > 20  # the page itself works
    assert any("Content Security Policy" in line for line in page.log())


def test_runs_are_picked_by_name_and_by_box(ladder, chromium):
    page = Page(chromium, ladder)
    every = page.shown()
    assert EVIL in every
    page.js(
        "const find = document.getElementById('find'); find.value = 'C1E11 s0';"
        "find.dispatchEvent(new Event('input'))"
    )
    page.click("#only")
    few = page.shown()
    assert few and all(name.startswith("c1e11") for name in few) and len(few) < len(every)
    assert page.shown("loss_by_flops") == few
    rows = page.js(
        "return [...document.querySelectorAll('tr[data-run]')].filter((r) => !r.hidden)"
        ".map((r) => r.dataset.run)"
    )
    assert all(name.startswith("c1e11") for name in rows)
    assert re.match(r"\d of 30", page.js("return document.getElementById('picked').textContent"))
    page.js("document.getElementById('find').value = ''")
    page.js("document.getElementById('find').dispatchEvent(new Event('input'))")
    page.click("#all")
    assert page.shown() == every
    page.click("#names input")
    assert len(page.shown()) == len(every) - 1


def test_a_click_in_the_legend_is_a_click_in_the_list(pair, chromium):
    page = Page(chromium, pair)
    toggle = chromium.find_element("css selector", "#loss_by_tokens .legendtoggle")
    chromium.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 0, "y": 0})
    page.js("arguments[0].scrollIntoView({block: 'center'})", toggle)
    from selenium.webdriver import ActionChains

    ActionChains(chromium).move_to_element(toggle).click().perform()
    wait(lambda: len(page.shown()) == 1)
    assert len(page.shown("loss_by_flops")) == 1
    assert page.js("return document.querySelectorAll('#names input:checked').length") == 1
    assert page.js("return document.querySelectorAll('.legendtext')[1].textContent").startswith(
        "wide <script>"
    )


def test_hovering_names_the_run(pair, chromium):
    page = Page(chromium, pair)
    page.js(
        "const plot = document.getElementById('loss_by_tokens');"
        "const end = plot.data.findIndex((t) => t.mode === 'lines+markers');"
        "Plotly.Fx.hover(plot, [{curveNumber: end, pointNumber: 0}])"
    )
    wait(lambda: page.js("return document.querySelector('.hoverlayer').textContent"))
    said = page.js("return document.querySelector('.hoverlayer').textContent")
    assert "narrow" in said and "2.125" in said


def test_a_table_is_sorted_by_a_click(ladder, chromium):
    page = Page(chromium, ladder)
    column = (
        "const head = [...document.querySelectorAll('th')].find((h) => h.textContent === 'loss');"
        "{}; return [...head.closest('table').tBodies[0].rows].map((r) => "
        "r.cells[head.cellIndex].textContent)"
    )
    for sign in (1, -1):
        values = page.js(column.format("head.querySelector('button').click()"))
        assert values[-1] == "nan"  # of the diverged run: last both ways
        numbers = [sign * float(value) for value in values[:-1]]
        assert numbers == sorted(numbers)
    states = page.js(column.format("").replace("'loss'", "'status'"))
    assert set(states) == {"finished", "diverged", "unfinished"}


def test_an_axis_is_changed_by_a_box(ladder, chromium):
    page = Page(chromium, ladder)
    axis = "return document.getElementById('loss_by_tokens').layout.xaxis.type"
    assert page.js(axis) == "log"
    page.click("[data-axis=x]")
    assert page.js(axis) == "linear" and not page.log()


@pytest.mark.parametrize("what", ["ladder", "pair"])
def test_a_phone_needs_no_sideways_scroll(what, chromium, request):
    page = Page(chromium, request.getfixturevalue(what), PHONE, 740)
    page.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.js("return document.documentElement.scrollWidth") <= PHONE
    wide = page.js(
        "return [...document.querySelectorAll('body *')].filter((e) => e.offsetParent && "
        "!e.closest('.scroll, svg') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert not wide
    widths = page.js("return [...document.querySelectorAll('.main-svg')].map((s) => s.clientWidth)")
    assert widths and all(200 < width <= PHONE for width in widths)


def test_nothing_is_cut_off_on_paper(ladder, chromium):
    page = Page(chromium, ladder)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.js("dispatchEvent(new Event('beforeprint'))")
    try:
        wide = page.js(
            "return [...document.querySelectorAll('table, .main-svg')]"
            ".map((e) => e.getBoundingClientRect().width).filter((w) => w > 681)"
        )
        assert not wide
        heights = page.js(  # whole tables, not what fits into a window of them
            "return [...document.querySelectorAll('.scroll')].filter((s) => "
            "s.scrollHeight > s.clientHeight + 1).length"
        )
        assert heights == 0
    finally:
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    pages = chromium.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert base64.b64decode(pages).startswith(b"%PDF")
    page.js("dispatchEvent(new Event('afterprint'))")
    wait(lambda: page.js("return document.querySelector('.main-svg').clientWidth") > 800)


def test_everything_has_a_name_for_who_cannot_see_it(ladder, chromium):
    page = Page(chromium, ladder)
    nameless = page.js(
        "return [...document.querySelectorAll('input, button, .plot')].filter((e) => "
        "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map((e) => e.outerHTML)"
    )
    assert not nameless
