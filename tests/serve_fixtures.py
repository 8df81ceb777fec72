"""Servers for tests: a tiny model with random weights, or a script in its place, on a free port."""

import contextlib
import dataclasses
import functools
import socket
import threading
from typing import NamedTuple

import flax.linen as nn
import httpx
import jax
import numpy as np
import uvicorn

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.chat_template import CHATML_TOKENS, ChatTemplate
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode.engine import QueueFull
from gpt_jax.decode.request import Output, Token
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer
from gpt_jax.serve.app import make_app
from gpt_jax.serve.protocol import protocol_with
from gpt_jax.serve.settings import Settings

TOKENIZER = byte_tokenizer(CHATML_TOKENS)
EOS, TURN_END = TOKENIZER.eos_id, TOKENIZER.token_id("<|im_end|>")
# A template that tells of tools, as those of Qwen do.
TOOL_TEMPLATE = ChatTemplate(
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Write <tool_call>...</tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "a template of tests",
)


def tiny_model(name: str = "tiny", template: ChatTemplate | None = TOOL_TEMPLATE, **values):
    """Two layers of 32 and a byte tokenizer."""
    config = TransformerConfig(**{
        "family": "decoder", "vocab_size": TOKENIZER.vocab_size, "seq_len": 512, "num_layers": 2,
        "embed_dim": 32, "mlp_dim": 64, "num_heads": 2, "dtype": "float32", **values,
    })  # fmt: skip
    model = Transformer(config, "cpu")
    tokens = np.zeros((1, 4), np.int32)
    inputs = {"encoder_tokens": tokens} if config.family == "encoder_decoder" else {}
    init = functools.partial(model.init, **inputs)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), tokens))["params"]
    # Weights as small as they begin would make all tokens equally likely.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)
    return OpenModel(
        name=name, model=model, params=params, tokenizer=TOKENIZER, prefix_ids=(EOS,),
        suffix_ids=(), eos_ids=(EOS,), chat_template=template, generation={}, labels=(),
    )  # fmt: skip


class Job:
    """As the engine's."""

    def __init__(self, number, request):
        self.id, self.request, self.cached_tokens = number, request, 0
        self.prompt_tokens = None


class ScriptedEngine:
    """Stands for decode.engine.Engine; `script` gives a request's ids.

    Attributes:
      requests: All that was asked for.
      fails: Raised by the next step.
    """

    def __init__(self, script, max_slots=4, max_waiting=8):
        self._script, self._max_slots, self._max_waiting = script, max_slots, max_waiting
        self._jobs, self._left, self._count = [], {}, 0
        self.requests, self.fails, self.ended = [], None, []
        self.gate = threading.Event()
        self.gate.set()

    def submit(self, request):
        if len(self._jobs) >= self._max_slots + self._max_waiting:
            raise QueueFull
        self._count += 1
        job = Job(self._count, request)
        if request.prompt_logprobs:
            job.prompt_tokens = [None] + [Token(i, -1.5, ((i, -1.5),)) for i in request.prompt[1:]]
        self.requests.append(request)
        self._jobs.append(job)
        for sample in range(request.params.n):
            ids = list(self._script(request, sample))[: request.params.max_tokens]
            self._left[job.id, sample] = ids
        return job

    def step(self, num_steps=None):
        self.gate.wait()
        if self.fails is not None:
            fails, self.fails = self.fails, None
            raise fails
        outputs = []
        for job in self._jobs[: self._max_slots]:
            for sample in range(job.request.params.n):
                left = self._left.get((job.id, sample))
                if left is None:
                    continue
                size = num_steps or 4
                now, self._left[job.id, sample] = left[:size], left[size:]
                ends = bool(now) and now[-1] in (EOS, *job.request.params.stop_ids)
                reason = "stop" if ends else None if left[size:] else "length"
                # Later samples are likelier.
                logprob = -0.5 + sample / 16
                tokens = tuple(Token(i, logprob, ((i, logprob), (65, -2.0))) for i in now)
                outputs.append((job, Output(sample, tokens, reason)))
                if reason:
                    self._left.pop((job.id, sample))
        self._jobs = [j for j in self._jobs if any(key[0] == j.id for key in self._left)]
        return outputs

    def cancel(self, job):
        for sample in range(job.request.params.n):
            self.end(job, sample)

    def end(self, job, sample):
        self.ended.append((job.id, sample))
        self._left.pop((job.id, sample), None)
        self._jobs = [j for j in self._jobs if any(key[0] == j.id for key in self._left)]

    @property
    def idle(self):
        return not self._jobs

    def stats(self):
        running = len(self._jobs[: self._max_slots])
        return {
            "running": running, "waiting": len(self._jobs) - running, "slots": self._max_slots,
            "free_slots": self._max_slots - running, "prompt_tokens": 0, "cached_tokens": 0,
            "generated_tokens": 0, "prefix_hits": 0,
        }  # fmt: skip


class Served(NamedTuple):
    """A server that runs; `http` speaks to it."""

    url: str
    http: httpx.Client
    service: object
    app: object

    def post(self, path, **body):
        """An answer's status and JSON."""
        answer = self.http.post(path, json=body)
        return answer.status_code, answer.json()

    def refused(self, path, **body):
        """(param, code) of a 400; its message names the field."""
        status, body = self.post(path, **body)
        assert status == 400, (status, body)
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] is None or error["message"].startswith(error["param"])
        return error["param"], error["code"]


@contextlib.contextmanager
def serving(opened, settings=Settings(), make_engine=None, warm_up=False):  # noqa: B008 (frozen)
    """A server on a free port of this machine, in a thread."""
    # What tests compile is little.
    settings = dataclasses.replace(settings, warm_up=warm_up)
    app = make_app(opened, settings, make_engine=make_engine)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=1, ws="none",
        http=protocol_with(settings.head_timeout_s),
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Served(url, client, app.state.service, app)
        finally:
            server.should_exit = True
            thread.join(20)
