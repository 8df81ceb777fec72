"""`gpt-jax generate`: every option reaches what writes, and mistakes are told in a line."""

import dataclasses
import re

import pytest
from test_embed import opened

from gpt_jax.cli.main import main
from gpt_jax.cli.sampling_options import add_sampling, sampling_params
from gpt_jax.convert import open_model
from gpt_jax.data.chat_template import ChatTemplate
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.write import Way, whole, write

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture
def generate(monkeypatch, capsys):
    """(arguments -> (exit code, what was printed, what was told)) of a tiny model."""
    source = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    template = ChatTemplate(source, "mine")
    model = dataclasses.replace(opened("decoder"), chat_template=template)
    monkeypatch.setattr(open_model, "open_model", lambda spec, step=None, field="": model)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "--run=tiny", "--max_tokens=6", "--temperature=0", *arguments])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


def written(prompt, params=GREEDY, **way):
    model = opened("decoder")
    return whole(write(model, [256, *prompt.encode()], params, Way(**way)), params.n)


def test_every_field_has_an_option(capsys):
    import argparse

    parser = argparse.ArgumentParser()
    add_sampling(parser)
    values = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9,
        "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "no_repeat_ngram": 4, "n": 2, "top_logprobs": 5, "seed": 7,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in values.items()]
    words += ["--stop=a", "--stop=b", "--stop_ids=5", "--logit_bias=7:-100", "--ignore_eos"]
    lists = {"stop": ("a", "b"), "stop_ids": (5,), "logit_bias": ((7, -100.0),)}
    assert set(values) | set(lists) | {"ignore_eos"} == {
        field.name for field in dataclasses.fields(SamplingParams)
    }
    params = sampling_params(parser.parse_args(words))
    assert params == SamplingParams(**values, **lists, ignore_eos=True)
    assert sampling_params(parser.parse_args([])) == SamplingParams()
    with pytest.raises(SystemExit):
        parser.parse_args(["--logit_bias=a:b"])
    assert "--logit_bias: 'a:b' is not ID:BIAS" in capsys.readouterr().err


def test_texts_are_the_model_s(generate):
    (plain,) = written("ab")
    assert generate("--prompt=ab") == (0, f"ab{plain.text}\n", "")
    assert generate("--prompt=ab", "--no-stream") == (0, f"ab{plain.text}\n", "")
    several = written("ab", dataclasses.replace(GREEDY, n=2))
    _, out, _ = generate("--prompt=ab", "--n=2")
    reasons = [text.finish_reason for text in several]
    assert out == "".join(
        f"--- {i + 1} ({reason})\nab{text.text}\n"
        for i, (text, reason) in enumerate(zip(several, reasons, strict=True))
    )


def test_ways_to_write(generate):
    (best,) = written("ab", beams=2)
    assert generate("--prompt=ab", "--beams=2")[1] == f"ab{best.text}\n"
    (drafted,) = written("ab", lookup=2)
    assert generate("--prompt=ab", "--prompt_lookup=2")[1] == f"ab{drafted.text}\n"


def test_weights_may_be_held_in_fewer_bits(generate):
    model = opened("decoder")
    for dtype in ("bfloat16", "int8"):
        held = open_model.held_as(model, dtype)
        (text,) = whole(write(held, [256, *b"ab"], GREEDY, Way()), 1)
        _, out, _ = generate("--prompt=ab", "--logprobs", f"--dtype={dtype}")
        assert out.startswith(f"ab{text.text}\n")
        assert f"{text.tokens[0].logprob:8.3f}" in out


def test_a_chat_is_answered_and_not_continued(generate):
    (answer,) = written_ids([*b"u:hi;"])
    assert generate("--chat", "--prompt=hi")[1] == f"{answer.text}\n"
    (answer,) = written_ids([*b"s:be;u:hi;"])
    assert generate("--chat", "--prompt=hi", "--system=be")[1] == f"{answer.text}\n"


def written_ids(ids):
    return whole(write(opened("decoder"), ids, GREEDY), 1)


def test_log_probabilities_are_shown(generate):
    (plain,) = written("ab")
    _, out, _ = generate("--prompt=ab", "--logprobs", "--top_logprobs=2")
    lines = out[len(f"ab{plain.text}\n") :].splitlines()
    assert len(lines) == len(plain.tokens)
    for line, token in zip(lines, plain.tokens, strict=True):
        numbers = re.findall(r"-?\d+\.\d{3}(?= ')", line)
        # Greedy: the token is the likeliest one.
        assert len(numbers) == 3 and numbers[0] == numbers[1] == f"{token.logprob:.3f}"


def test_the_text_may_be_held_to_a_form(generate, tmp_path):
    pytest.importorskip("llguidance")
    assert generate("--prompt=a", "--regex=xyz")[1] == "axyz\n"
    schema = tmp_path / "schema.json"
    schema.write_text('{"const": 1}')
    assert generate("--prompt=a", f"--json_schema={schema}")[1] == "a1\n"
    schema.write_text("{")
    assert "json_schema: it is no JSON" in generate(f"--json_schema={schema}")[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--beams=2", "--prompt_lookup=2"], "error: --beams: does not go together with lookup"),
        (["--beams=2", "--top_k=3"], "error: --top_k: 3 does not go together with beams"),
        (["--suffix=x"], "error: --suffix: this model was not trained to fill in text"),
        (["--suffix=x", "--chat"], "error: --suffix: does not go together with chat"),
        (["--system=x"], "error: --system: goes with chat alone"),
        (["--chat", "--prompt=<|endoftext|>"], "error: --prompt[0].content: holds the special"),
        (["--min_tokens=9"], "error: --min_tokens: 9 is not an integer from 0 to max_tokens 6"),
        (["--stop="], "error: --stop: ('',) is not a tuple of non-empty strings"),
        (["--json_schema=nowhere.json"], "error: --json_schema: 'nowhere.json' cannot be read"),
        (["--regex=a", "--ignore_eos"], "error: --ignore_eos: a text that is held to a form"),
        (["--prompt=" + "a" * 60], "error: --prompt: 61 tokens are not fewer than the model's"),
    ],
)
def test_mistakes(generate, arguments, told):
    code, _, err = generate(*arguments)
    assert code == 2 and told in err and err.count("\n") == 1
