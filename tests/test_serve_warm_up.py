"""What a server compiles before it says that it is ready."""

import threading
import time

import jax.monitoring
import pytest
from serve_fixtures import EOS, ScriptedEngine, serving, tiny_model

from gpt_jax.data.chat_template import ChatTemplate
from gpt_jax.serve.settings import Settings

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """Grows by each program that is compiled."""
    found = []

    def listen(event, seconds, **_):
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def wait_for_health(served, status=200, seconds=60.0):
    end = time.monotonic() + seconds
    while served.http.get("/health").status_code != status:
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_first_requests_compile_nothing(compiled):
    # All lengths of caches are one in so short a context.
    template = ChatTemplate("{{ messages[0].content }}", "mine")
    with serving(tiny_model("tiny", template, num_layers=1, seq_len=32), warm_up=True) as served:
        wait_for_health(served)
        assert compiled
        compiled.clear()
        prompt = {"model": "tiny", "prompt": "Once"}
        messages = [{"role": "user", "content": "hi"}]
        for path, body in (
            ("/v1/completions", {**prompt, "temperature": 0}),
            ("/v1/completions", prompt),
            ("/v1/chat/completions", {"model": "tiny", "messages": messages}),
        ):
            assert served.post(path, **body)[0] == 200
        assert not compiled


def test_vectors_of_one_text_compile_nothing(compiled):
    model = tiny_model(
        family="encoder", head="none", num_layers=1, positions="learned", norm="layernorm"
    )
    with serving(model, warm_up=True) as served:
        wait_for_health(served)
        assert compiled
        compiled.clear()
        assert served.post("/v1/embeddings", model="tiny", input="a text")[0] == 200
        assert not compiled


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_not_ready_before(whole):
    gate, engines = threading.Event(), []

    class Gated(ScriptedEngine):
        def step(self, num_steps=None):
            gate.wait()
            return super().step(num_steps)

    def make_engine():
        engines.append(Gated(lambda request, sample: [65, EOS]))
        return engines[-1]

    with serving(tiny_model(), Settings(stall_timeout_s=0.1), make_engine, whole) as served:
        time.sleep(0.3)
        answer = served.http.get("/health")
        # One that compiles is no broken one.
        assert answer.status_code == 503 and answer.json() == {"status": "starting"}
        gate.set()
        wait_for_health(served)
        assert served.post("/v1/completions", model="tiny", prompt="a")[0] == 200
        temperatures = [request.params.temperature for request in engines[0].requests[:-1]]
        assert temperatures == ([0.0, 1.0] * 2 if whole else [1.0])
