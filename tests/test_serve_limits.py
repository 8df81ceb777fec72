"""What a server bears: keys, limits, vanishing clients, a broken engine, malformed bodies."""

import concurrent.futures
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from serve_fixtures import EOS, ScriptedEngine, serving, tiny_model

from gpt_jax.data.chat_template import ChatTemplate
from gpt_jax.serve.settings import Settings

USER = [{"role": "user", "content": "hi"}]


def script(request, sample):
    return [*b"hello", EOS]


def endless(request, sample):
    return [65] * 10_000


def scripted(engines=None, script=script, **values):
    """A maker of engines, which also go into a list."""

    def make_engine():
        engine = ScriptedEngine(script, **values)
        if engines is not None:
            engines.append(engine)
        return engine

    return make_engine


@pytest.fixture(scope="module")
def opened():
    return tiny_model()


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_keys(opened, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-1\n\nsecret-2\n")
    with serving(opened, Settings(api_keys=str(keys)), scripted()) as served:
        for key in (None, "secret", "secret-11", "# ours", "é"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
            for path in ("/v1/models", "/metrics", "/nowhere", "/v1/completions"):
                answer = served.http.get(path, headers=headers)
                assert answer.status_code == 401, (key, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert "secret" not in answer.text
        basic = served.http.get("/v1/models", headers={"Authorization": "Basic secret-1"})
        assert basic.status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="no").models.list()
        for key in ("secret-1", "secret-2"):
            client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key)
            assert client.completions.create(model="tiny", prompt="a").choices[0].text == "hello"
        assert served.http.get("/health").status_code == served.http.get("/").status_code == 200


@pytest.mark.parametrize("text", ["", "# none\n", "  # none\n"])
def test_files_of_keys_that_are_none(opened, tmp_path, text):
    from gpt_jax.serve.app import make_app

    path = tmp_path / "keys"
    with pytest.raises(ValueError, match=r"api_keys: .+ is not a file"):
        make_app(opened, Settings(api_keys=str(path)))
    path.write_text(text)
    with pytest.raises(ValueError, match=r"api_keys: .+ holds no key"):
        make_app(opened, Settings(api_keys=str(path)))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"api_keys: .+ is no text"):
        make_app(opened, Settings(api_keys=str(path)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("host", ""), ("port", -1), ("port", 70_000), ("slots", 0), ("slots", True), ("max_n", 1.5),
     ("request_timeout_s", 0), ("drain_timeout_s", float("nan")), ("aliases", "a"),
     ("aliases", ("",)), ("max_body_bytes", 0), ("max_waiting", -1)],
)  # fmt: skip
def test_settings_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        Settings(**{field: value})


def test_bodies_that_are_too_long_or_of_another_kind(opened):
    with serving(opened, Settings(max_body_bytes=1000, body_timeout_s=1.0), scripted()) as served:
        url, http = "/v1/completions", served.http
        long = json.dumps({"model": "tiny", "prompt": "a" * 1000}).encode()
        kind = {"Content-Type": "application/json"}
        assert http.post(url, content=long, headers=kind).status_code == 413
        # Without a length, in parts.
        parts = (long[i : i + 100] for i in range(0, len(long), 100))
        assert http.post(url, content=parts, headers=kind).status_code == 413
        huge = {**kind, "Content-Length": "9" * 4000}
        assert raw(served, url, huge).startswith(("HTTP/1.1 413", "HTTP/1.1 400"))
        for other in ("text/plain", "", "application/x-www-form-urlencoded"):
            answer = http.post(url, content=b'{"model": "tiny"}', headers={"Content-Type": other})
            assert answer.status_code == 400 and "Content-Type" in answer.json()["error"]["message"]
        answer = raw(served, url, {**kind, "Content-Length": "100"})
        assert answer.startswith("HTTP/1.1 408")
        good = {"Content-Type": "Application/JSON; charset=utf-8"}
        answer = http.post(url, content=b'{"model": "tiny"}', headers=good)
        assert answer.status_code == 200


def raw(served, path, headers, body=b""):
    """What a server answers to bytes as they are."""
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        lines = [f"POST {path} HTTP/1.1", "Host: a", *(f"{k}: {v}" for k, v in headers.items())]
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return connection.recv(65536).decode()


def test_a_limit_of_tokens(opened):
    engines = []
    with serving(opened, Settings(max_tokens=5), scripted(engines, endless)) as served:
        body = {"model": "tiny", "prompt": "a"}
        assert served.refused("/v1/completions", **body, max_tokens=6)[0] == "max_tokens"
        assert served.post("/v1/completions", **body)[1]["usage"]["completion_tokens"] == 5
        chat = {"model": "tiny", "messages": USER}
        answer = served.post("/v1/chat/completions", **chat)[1]
        assert answer["choices"][0]["message"]["content"] == "A" * 5
        refused = served.refused("/v1/chat/completions", **chat, max_completion_tokens=6)
        assert refused[0] == "max_completion_tokens"


def test_a_full_queue_says_when_to_come_back(opened):
    engines = []
    make = scripted(engines, max_slots=2, max_waiting=2)
    with serving(opened, Settings(max_waiting=2, slots=2), make) as served:
        wait_until(lambda: served.http.get("/health").status_code == 200)
        engines[0].gate.clear()
        body = {"model": "tiny", "prompt": "a"}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            # The engine's thread stands in a step until the gate opens.
            waiting = [pool.submit(served.http.post, "/v1/completions", json=body)
                       for _ in range(8)]  # fmt: skip
            runner = served.service.runner
            # Those that came before the step began are refused already.
            wait_until(
                lambda: len(runner._running) + runner._commands.qsize()
                + sum(future.done() for future in waiting) == 8
            )  # fmt: skip
            engines[0].gate.set()
            answers = [future.result() for future in waiting]
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        # All prompts of a request are taken or none: five do not fit.
        engines[0].gate.clear()
        assert served.post("/v1/completions", model="tiny", prompt=["a"] * 5)[0] == 429
        assert engines[0].idle
        engines[0].gate.set()
        assert served.post("/v1/completions", **body)[0] == 200


def test_too_many_requests_at_once(opened):
    engines = []
    with serving(opened, Settings(max_requests=1), scripted(engines)) as served:
        wait_until(lambda: served.http.get("/health").status_code == 200)
        engines[0].gate.clear()
        body = {"model": "tiny", "prompt": "a", "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            assert served.http.get("/v1/models").status_code == 429
            assert served.http.get("/health").status_code == 200
            engines[0].gate.set()
            answer.read()
        wait_until(lambda: served.http.get("/v1/models").status_code == 200)


def test_clients_that_vanish_leave_nothing(opened):
    engines = []
    make = scripted(engines, endless, max_slots=4, max_waiting=200)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "n": 2}
    with serving(opened, Settings(), make) as served:

        def vanish(number):
            path = "/v1/chat/completions" if number % 2 else "/v1/completions"
            what = {"messages": USER, "max_tokens": 200} if number % 2 else body
            ask = {**body, **what, "stream": number % 4 < 2}
            ask.pop("prompt" if number % 2 else "messages", None)
            if not ask["stream"]:
                with pytest.raises(httpx.TimeoutException):
                    served.http.post(path, json=ask, timeout=0.05)
                return
            with served.http.stream("POST", path, json=ask) as answer:
                for _ in answer.iter_lines():
                    break

        engines_ready = lambda: served.http.get("/health").status_code == 200  # noqa: E731
        wait_until(engines_ready)
        slow = engines[0].step
        engines[0].step = lambda num_steps=None: (time.sleep(0.005), slow(1))[1]
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            list(pool.map(vanish, range(100)))
        wait_until(lambda: engines[0].idle and not served.service.in_flight)
        # None of them went on to its end, but the one that warmed the engine.
        assert len({job for job, _ in engines[0].ended}) == len(engines[0].requests) - 1 > 90
        assert not served.service.runner._running and not served.service.runner._unstarted
        text = served.http.get("/metrics").text
        cancelled = next(x for x in text.splitlines() if 'finished_total{reason="cancelled' in x)
        assert float(cancelled.split()[-1]) >= 50
        engines[0].step = slow
        assert served.post("/v1/completions", **{**body, "max_tokens": 3})[0] == 200


def test_an_engine_that_breaks_fails_its_requests_only(opened, caplog):
    engines = []
    with serving(opened, Settings(), scripted(engines)) as served:
        body = {"model": "tiny", "prompt": "a"}
        assert served.post("/v1/completions", **body)[0] == 200
        engines[-1].fails = RuntimeError("out of memory at 0x123")
        status, answer = served.post("/v1/completions", **body)
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert "0x123" not in json.dumps(answer)
        assert served.post("/v1/completions", **body)[0] == 200 and len(engines) == 2
        engines[-1].fails = RuntimeError("again")
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.APIError, match="had an error"):
            list(client.completions.create(**body, stream=True))
        with served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as good:
            assert "[DONE]" in good.read().decode()
        submit = engines[-1].submit
        engines[-1].submit = lambda request: 1 / 0
        assert served.post("/v1/completions", **body)[0] == 500
        engines[-1].submit = submit
        assert served.http.get("/health").status_code == 200


def test_an_answer_that_takes_too_long(opened):
    engines = []
    with serving(opened, Settings(request_timeout_s=0.3), scripted(engines)) as served:
        wait_until(lambda: served.http.get("/health").status_code == 200)
        engines[0].gate.clear()
        try:
            status, body = served.post("/v1/completions", model="tiny", prompt="a")
            assert status == 504 and body["error"]["code"] == "timeout"
            body = {"model": "tiny", "prompt": "a", "stream": True}
            # The thread of the engine stands still, so not even the beginning comes in time.
            assert served.post("/v1/completions", **body)[0] == 504
        finally:
            engines[0].gate.set()
        wait_until(lambda: engines[0].idle)


def test_health_sees_an_engine_that_stands_still(opened):
    engines = []
    with serving(opened, Settings(stall_timeout_s=0.2), scripted(engines)) as served:
        wait_until(lambda: served.http.get("/health").status_code == 200)
        engines[0].gate.clear()
        body = {"model": "tiny", "prompt": "a"}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(served.http.post, "/v1/completions", json=body)
            wait_until(lambda: served.http.get("/health").json() == {"status": "stalled"})
            engines[0].gate.set()
            assert waiting.result().status_code == 200
        assert served.http.get("/health").status_code == 200


def test_steps_and_calls_take_turns(opened):
    engines, order = [], []
    with serving(opened, Settings(), scripted(engines, endless)) as served:
        wait_until(lambda: served.http.get("/health").status_code == 200)
        runner, step = served.service.runner, engines[0].step

        def slow_step(num_steps=None):
            time.sleep(0.002)
            order.append("step")
            return step(1)

        engines[0].step = slow_step
        body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            engines[0].gate.clear()
            for _ in range(3):
                runner._commands.put(lambda: runner._calls.append(lambda: order.append("call")))
            engines[0].gate.set()
            wait_until(lambda: order.count("call") == 3)
        first = order.index("call")
        assert order[first : first + 5] == ["call", "step", "call", "step", "call"]


def test_what_fails_in_the_thread_leaves_it_alive(opened, caplog):
    engines = []
    with serving(opened, Settings(), scripted(engines)) as served:
        body = {"model": "tiny", "prompt": "a"}
        assert served.post("/v1/completions", **body)[0] == 200
        served.service.runner._commands.put(lambda: 1 / 0)
        assert served.post("/v1/completions", **body)[0] == 200
        assert served.http.get("/health").status_code == 200


def test_an_engine_that_cannot_be_made(opened, caplog):
    def make_engine():
        raise RuntimeError("no memory")

    with serving(opened, Settings(), make_engine) as served:
        assert served.http.get("/health").json() == {"status": "starting"}
        assert served.post("/v1/completions", model="tiny", prompt="a")[0] == 503


def test_draining_refuses_what_is_new(opened):
    with serving(opened, Settings(), scripted()) as served:
        served.service.draining = True
        status, body = served.post("/v1/completions", model="tiny", prompt="a")
        assert status == 503 and body["error"]["code"] == "shutting_down"
        assert served.http.get("/health").json() == {"status": "draining"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "ran"),
        (
            "{% set x = 'a' * 8000000 %}{{ ([0] * 60000) | map('default', x, true) | map('upper') "
            "| select('equalto', 1) | list }}",
            "ran",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
        ("", "makes nothing"),
    ],
)
def test_templates_are_held_in(source, said):
    opened = tiny_model(template=ChatTemplate(source, "a template"))
    settings = Settings(template_timeout_s=1.0)
    with serving(opened, settings, scripted()) as served:
        status, body = served.post("/v1/chat/completions", model="tiny", messages=USER)
        assert status == 400 and said in body["error"]["message"]
        assert body["error"]["param"] == "messages"


def test_a_model_that_only_embeds():
    opened = tiny_model(family="encoder", head="mlm")
    with serving(opened) as served:
        wait_until(lambda: served.http.get("/health").status_code == 200)
        assert served.refused("/v1/completions", model="tiny", prompt="a")[0] == "model"
        assert served.refused("/v1/chat/completions", model="tiny", messages=USER)[0] == "model"
        assert served.post("/v1/embeddings", model="tiny", input="a")[0] == 200


def test_other_origins_are_let_in_only_if_named(opened):
    origin = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in (((), None), (("https://a.example",), "https://a.example")):
        with serving(opened, Settings(cors_origins=origins), scripted()) as served:
            answer = served.http.options("/v1/completions", headers=origin)
            assert answer.headers.get("access-control-allow-origin") == allowed


def is_closed(connection, seconds):
    """Whether the server ends a connection in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_heads_that_do_not_come_on(opened):
    settings = Settings(head_timeout_s=0.5)
    with serving(opened, settings, scripted()) as served:
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        head = b"GET /health HTTP/1.1\r\nHost: a\r\n"
        with socket.create_connection(address) as silent:
            assert is_closed(silent, 5)
        with socket.create_connection(address) as slow:
            slow.sendall(head)
            assert is_closed(slow, 5)
        with socket.create_connection(address) as again:
            again.sendall(head + b"\r\n")
            assert again.recv(65536).startswith(b"HTTP/1.1 200")
            again.sendall(b"GET /hea")
            assert is_closed(again, 5)
        assert served.http.get("/health").status_code == 200


def test_a_client_that_does_not_read_is_let_go(opened):
    settings = Settings(request_timeout_s=0.5, body_timeout_s=0.5, max_body_bytes=1 << 23)
    with serving(opened, settings, scripted()) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        body = json.dumps({"prompt": "ab " * 1_500_000}).encode()
        lines = "POST /tokenize HTTP/1.1", "Host: a", "Content-Type: application/json"
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}"]).encode()
        client.sendall(head + b"\r\n\r\n" + body)
        wait_until(lambda: served.service.in_flight == 1)
        wait_until(lambda: served.service.in_flight == 0)
        assert served.http.get("/health").status_code == 200


_SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from serve_fixtures import ScriptedEngine, tiny_model
from gpt_jax.serve.app import make_app
from gpt_jax.serve.server import Server, listen
from gpt_jax.serve.settings import Settings
import time
class Slow(ScriptedEngine):
    def step(self, num_steps=None):
        time.sleep(0.05)
        return super().step(1)
settings = Settings(port=0, warm_up=False, drain_timeout_s=float(sys.argv[2]))
with listen(settings) as listener:
    app = make_app(tiny_model(), settings, make_engine=lambda: Slow(lambda r, s: [65] * 400))
    print(listener.getsockname()[1], flush=True)
    Server(app, settings).run(sockets=[listener])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("drain", "complete"), [(30, True), (0.5, False)])
def test_sigterm_finishes_what_has_begun(drain, complete):
    folder = pathlib.Path(__file__).parent
    command = [sys.executable, "-c", _SERVER, str(folder), str(drain)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder.parent, text=True) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        http = httpx.Client(base_url=url, timeout=60)
        wait_until(lambda: http.get("/health").status_code == 200, 60)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 60, "stream": True}
        text = ""
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/v1/models").status_code == 503)
            assert httpx.get(f"{url}/health").json() == {"status": "draining"}
            for line in lines:
                text += line
        assert text.endswith("[DONE]") and ("shutting down" not in text) == complete
        assert server.wait(20) == 0
