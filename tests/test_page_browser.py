"""The server's page in headless Chromium: it streams, stops, fits a phone, and runs no markup."""

import contextlib
import dataclasses
import json
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.chat_template import CHATML_TOKENS
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, init_params

pytestmark = pytest.mark.browser

DRIVER, BROWSER = Path("/usr/bin/chromedriver"), Path("/usr/bin/chromium")
# What the model writes, round and round.
EVIL = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'> "
WIDTH = 360


def writer():
    """A model that writes EVIL whatever it reads: which character follows is said by the place."""
    tokenizer = byte_tokenizer(CHATML_TOKENS)
    period = len(EVIL)
    config = TransformerConfig(
        tokenizer.vocab_size, 3000, 1, period, 1, positions="learned", norm="layernorm",
        qk_norm=False, head_dim=2, mlp_dim=4,
    )  # fmt: skip
    model = Transformer(config)
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nn.unbox(boxed))
    place = np.arange(3000) % period
    params["positions"][np.arange(3000), place] = 1.0
    params["final_norm"]["scale"][:] = 1.0
    params["head"][np.arange(period), list(EVIL.encode())] = 9.0
    return OpenModel(
        name="tiny-writer", model=model, params=params, tokenizer=tokenizer, prefix_ids=(256,),
        suffix_ids=(), eos_ids=(256,), chat_template=None, generation={}, labels=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def server():
    """(address, the server's Service)."""
    with serving(writer()) as served:
        yield served


@contextlib.contextmanager
def serving(opened):
    uvicorn = pytest.importorskip("uvicorn")
    from gpt_jax.serve.app import make_app
    from gpt_jax.serve.settings import Settings

    app = make_app(opened, Settings(warm_up=False))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait(lambda: running.started and app.state.service.runner.is_ready, 60)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/", app.state.service
    running.should_exit = True
    thread.join(10)


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
    service = webdriver.ChromeService(str(DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """The page in a browser of some width."""

    def __init__(self, driver, address, width=1200, height=800):
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get("about:blank")
        driver.get(address)
        driver.get_log("browser")
        wait(lambda: "looking" not in self.text("#model"))

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def count(self, selector):
        return self.js("return document.querySelectorAll(arguments[0]).length", selector)

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def set(self, **values):
        for name, value in values.items():
            self.js("document.getElementById(arguments[0]).value = arguments[1]", name, value)

    def write(self, text):
        self.driver.find_element("css selector", "#prompt").send_keys(text)

    @property
    def writes(self):
        return not self.js("return document.getElementById('stop').hidden")

    def ended(self):
        wait(lambda: not self.writes)


def wait(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_prompt_is_completed_in_pieces(server, chromium):
    page = Page(chromium, server[0] + "#complete")
    assert page.text("#model") == "tiny-writer"
    page.set(max_tokens="300", temperature="0")
    page.write("Once upon")
    page.js(
        "window.grown = 0; new MutationObserver(() => grown++).observe("
        "document.getElementById('outputs'), {subtree: true, childList: true})"
    )
    page.click("#send")
    page.ended()
    assert page.js("return grown") > 10  # before our eyes
    written = page.text(".new")
    assert len(written) == 300 and EVIL in written
    assert page.text(".given") == "Once upon"
    assert "10 + 300 tokens" in page.text("#status") and "tokens/s" in page.text("#status")
    assert "most tokens reached" in page.text(".card footer")
    assert not page.text("#error")
    page.click(".card footer button:last-child")
    assert page.js("return document.getElementById('prompt').value") == "Once upon" + written


def test_a_model_without_a_chat_template_begins_with_completing(server, chromium):
    tab = "return document.querySelector('[aria-selected=true]').id"
    assert Page(chromium, server[0]).js(tab) == "tab-chat"
    with serving(dataclasses.replace(writer(), tokenizer=byte_tokenizer())) as (address, _):
        assert Page(chromium, address).js(tab) == "tab-complete"
        assert Page(chromium, address + "#chat").js(tab) == "tab-chat"


def test_what_a_model_writes_is_text_and_never_markup(server, chromium):
    page = Page(chromium, server[0])
    page.set(max_tokens="150")
    page.write("hello <b>there</b>")
    page.click("#send")
    page.ended()
    assert EVIL in page.text(".assistant .text")
    assert page.text(".user .text") == "hello <b>there</b>"
    assert not page.count(".turn script, .turn img, .turn b") and page.js("return !window.hit")
    logs = [entry["message"] for entry in chromium.get_log("browser")]
    assert not logs, logs


def test_a_chat_goes_on(server, chromium):
    page = Page(chromium, server[0])
    page.set(max_tokens="20")
    for number in (1, 2):
        page.write(f"turn {number}")
        page.js(  # Ctrl+Enter sends
            "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 'Enter', ctrlKey: true, bubbles: true}))"
        )
        page.ended()
        assert page.count(".turn.user") == page.count(".turn.assistant") == number
    roles = page.js("return messages.map((message) => message.role)")
    assert roles == ["user", "assistant", "user", "assistant"]
    # The second request held the first exchange.
    prompt = int(page.text("#status").split(" + ")[0])
    assert prompt > len("turn 1") + 20 + len("turn 2")
    page.click("#clear")
    assert page.count(".turn") == 0 and page.js("return messages.length") == 0


def test_stop_ends_the_work_of_the_server_too(server, chromium, monkeypatch):
    runner = server[1].runner
    step = runner._engine.step

    def slow_step(*arguments):  # else a fast machine is done before the button is reached
        time.sleep(0.02)
        return step(*arguments)

    monkeypatch.setattr(runner._engine, "step", slow_step)
    page = Page(chromium, server[0] + "#complete")
    page.set(max_tokens="2500", temperature="1", seed="3", top_p="0.9", top_k="5")
    page.write("x")
    page.click("#send")
    wait(lambda: len(page.text(".new")) > 20)
    page.click("#stop")
    page.ended()
    length = len(page.text(".new"))
    assert 20 < length < 2000
    assert page.text("#status").endswith("stopped")
    wait(lambda: not runner._running and runner._engine.idle, 5)
    assert len(page.text(".new")) == length
    # And the next request is answered.
    page.set(max_tokens="5")
    page.click("#send")
    page.ended()
    assert len(page.text(".new")) == 5


def test_several_continuations_have_a_card_each(server, chromium):
    page = Page(chromium, server[0] + "#complete")
    page.set(max_tokens="12", n="3")
    page.js("document.getElementById('stop-strings').value = 'window'")
    page.write("a")
    page.click("#send")
    page.ended()
    assert page.count(".card") == 3 and "3 of 3" in page.text(".card:last-child")


def test_errors_are_told_in_words_and_the_message_is_kept(server, chromium):
    page = Page(chromium, server[0])
    page.set(max_tokens="9000")
    page.write("a question")
    page.click("#send")
    page.ended()
    assert "context" in page.text("#error") or "max" in page.text("#error")
    assert page.js("return document.getElementById('prompt').value") == "a question"
    assert page.count(".turn") == 0
    page.set(max_tokens="0")
    page.click("#send")
    assert page.text("#error").startswith("Most tokens: ")
    # The server is gone.
    page.js("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.set(max_tokens="5")
    page.click("#send")
    page.ended()
    assert page.text("#error") == "The server cannot be reached."


def test_a_key_stays_in_the_tab_and_goes_with_requests(server, chromium):
    page = Page(chromium, server[0])
    page.js(
        "document.getElementById('key').value = 'sk-1'; document.getElementById('key').onchange()"
    )
    page.js(
        "window.sent = []; const real = window.fetch;"
        "window.fetch = (path, how) => { sent.push(how.headers); return real(path, how); }"
    )
    page.set(max_tokens="2")
    page.write("a")
    page.click("#send")
    page.ended()
    assert page.js("return sent[0].Authorization") == "Bearer sk-1"
    stored = page.js("return [JSON.stringify(sessionStorage), JSON.stringify(localStorage)]")
    assert json.loads(stored[0]) == {"gpt_jax_key": "sk-1"} and json.loads(stored[1]) == {}
    page.js("sessionStorage.clear()")


@pytest.mark.parametrize("mode", ["chat", "complete"])
def test_a_phone_needs_no_sideways_scroll(server, chromium, mode):
    page = Page(chromium, f"{server[0]}#{mode}", WIDTH, 740)
    page.set(max_tokens="200")
    page.js("document.getElementById('panel').open = true")
    page.write("w" * 100)
    page.click("#send")
    page.ended()
    assert page.js("return document.documentElement.scrollWidth") <= WIDTH
    wide = page.js(
        "return [...document.querySelectorAll('body *')].filter((e) => e.offsetParent && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert not wide


def test_everything_has_a_name_for_who_cannot_see_it(server, chromium):
    page = Page(chromium, server[0])
    nameless = page.js(
        "return [...document.querySelectorAll('input, textarea, button')].filter((e) => "
        "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map((e) => e.outerHTML)"
    )
    assert not nameless
    # The arrows change the mode, as tabs do.
    page.driver.find_element("css selector", "#tab-chat").send_keys("\ue014")
    assert page.js("return [mode, document.activeElement.id]") == ["complete", "tab-complete"]
