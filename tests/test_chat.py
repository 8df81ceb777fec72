"""Conversations: what templates write, which tokens are learned, and what is refused."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest

from gpt_jax.data.chat import check_messages, encode_chat, encode_preference, encode_prompt
from gpt_jax.data.chat_template import CHATML, CHATML_TOKENS, ChatTemplate
from gpt_jax.data.examples import Layout
from gpt_jax.data.tokenizers import byte_tokenizer, train_bpe
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, forward, init_params

CHATML_PLAIN = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Puts a system message in front where there is none.
DEFAULT_SYSTEM = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
) + CHATML_PLAIN.removeprefix("{% for message in messages %}")
# The system message goes into the first question; no generation prompt; spaces are trimmed.
BRACKETS = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate\nuser, assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') }}
        {{- message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
HEADERS = (
    "{% set ns = namespace(first=true) %}"
    "{% for m in messages %}"
    "{% set text = '<|start|>' + m.role + '<|mid|>\n\n' + m['content'] | trim + '<|end|>' %}"
    "{% if ns.first %}{% set text = bos_token + text %}{% endif %}{% set ns.first = false %}"
    "{{ text }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|mid|>\n\n' }}{% endif %}"
)
TURNS = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<turn>' ~ role ~ '\n' ~ message.content | trim ~ '<end_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<turn>model\n' }}
{%- endif %}"""
MARKED = """{{ bos_token }}
{%- macro show(message) %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim }}<|end|>{% endgeneration %}
    {%- else %}
        {{- message.content | trim }}<|end|>
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {{- '<|start|>' + message.role + '<|mid|>' }}{{ show(message) }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|mid|>' }}{% endif %}"""
# Ends the whole text, not each turn, with the end-of-text token.
LAST_EOS = CHATML_PLAIN.replace(
    "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
)
PLAIN_TEXT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|start|>", "<|mid|>", "<|end|>", "<turn>", "<end_turn>", *CHATML_TOKENS)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# A template, and what stands around an answer in the text that is learned.
STYLES = {
    "built-in": (CHATML.source, "{}<|im_end|>"),
    "chatml": (CHATML_PLAIN, "{}<|im_end|>"),
    "default system": (DEFAULT_SYSTEM, "{}<|im_end|>"),
    "brackets": (BRACKETS, " {} </s>"),
    "headers": (HEADERS, "{}<|end|>"),
    "marked": (MARKED, "{}<|end|>"),
    "turns": (TURNS, "{}<end_turn>"),
    "plain text": (PLAIN_TEXT, "{}\n"),
}
CONVERSATION = [
    {"role": "system", "content": "Answer in one word: ¿sí?"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "four 👍🏽"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "中"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(SPECIAL)


@pytest.fixture(params=STYLES)
def style(request):
    source, learned = STYLES[request.param]
    return ChatTemplate(source, "t.jinja", TOKENS), learned


def chatml(source=CHATML_PLAIN):
    return ChatTemplate(source, "t.jinja", TOKENS)


def turns(*contents, system=None):
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def learned_text(tokenizer, record):
    """The text of the targets that count."""
    return tokenizer.decode(record["targets"][record["loss_mask"] > 0], skip_special_tokens=False)


def test_spans_are_the_answers_and_what_ends_them(style):
    template, learned = style
    for messages in (CONVERSATION, CONVERSATION[1:]):
        text, spans = template.render_with_spans(messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert text == template.render(messages)
        assert [text[start:end] for start, end in spans] == [learned.format(a) for a in answers]
        for i, (start, _) in zip((-3, -1), spans, strict=True):
            assert text[:start] == template.render(messages[:i], add_generation_prompt=True)


def test_only_the_answers_are_learned(style, tokenizer):
    template, learned = style
    record = encode_chat(CONVERSATION, tokenizer, template, 300)
    assert learned_text(tokenizer, record) == learned.format("four 👍🏽") + learned.format("中")
    text = template.render(CONVERSATION)
    ids, _ = tokenizer.encode_with_offsets(text, parse_special=True)
    size = len(record["tokens"])
    assert record["tokens"].tolist() == ids[:size]
    assert record["targets"].tolist() == ids[1 : size + 1]
    assert record["loss_mask"][-1] == 1  # nothing behind the last answer
    assert record["positions"].tolist() == list(range(size))
    assert set(record["segment_ids"]) == {1}


def test_training_begins_where_a_prompt_at_inference_ends(style, tokenizer):
    template, _ = style
    record = encode_chat(CONVERSATION[:3], tokenizer, template, 300)
    prompt = encode_prompt(CONVERSATION[:2], tokenizer, template)
    assert record["tokens"][: len(prompt)].tolist() == prompt
    assert np.flatnonzero(record["loss_mask"])[0] == len(prompt) - 1


def test_offsets_without_white_space_still_count_every_token():
    class Trimmed:
        """What tokenizers with `trim_offsets` say: a blank has an empty range at its end."""

        special_tokens = CHATML_TOKENS

        def encode_with_offsets(self, text, *, parse_special):
            ids, offsets = inner.encode_with_offsets(text, parse_special=parse_special)
            return ids, [(e, e) if text[s:e].isspace() else (s, e) for s, e in offsets]

    inner = byte_tokenizer(CHATML_TOKENS)
    record = encode_chat(turns("a", " b \n"), Trimmed(), CHATML, 100)
    assert learned_text(inner, record) == " b \n<|im_end|>"
    record = encode_chat(turns("a", "b", "c", "d"), Trimmed(), chatml(PLAIN_TEXT), 100)
    assert learned_text(inner, record) == "b\nd\n"


def test_a_token_over_the_border_of_a_prompt_is_learned():
    bpe = train_bpe(["assistant: yes\nuser: no\n" * 50], 300)
    assert len(bpe.encode(" yes")) == 1
    record = encode_chat(turns("no", "yes"), bpe, chatml(PLAIN_TEXT), 100)
    assert learned_text(bpe, record) == " yes\n"


def test_several_answers_in_a_row_and_empty_ones(tokenizer):
    messages = turns("a", "b") + [{"role": "assistant", "content": ""}]
    for template in (CHATML, chatml()):
        record = encode_chat(messages, tokenizer, template, 100)
        assert learned_text(tokenizer, record) == "b<|im_end|><|im_end|>"


def test_the_date_of_training_data_does_not_move():
    template = chatml("{{ strftime_now('%d %B %Y') }}" + CHATML_PLAIN)
    assert template.render_with_spans(turns("a", "b"))[0].startswith("01 January 2025")
    assert not template.render(turns("a", "b")).startswith("01 January 2025")


def test_what_hugging_face_templates_use():
    source = (
        "{% for m in messages %}\n"
        "    {% if m.role == 'tool' %}\n"
        "{{ m.content | tojson }}\n"
        "    {% endif %}\n"
        "    {% if loop.index == 2 %}{% break %}{% endif %}\n"
        "{% endfor %}{{ {'a': '<中>'} | tojson(indent=1) }}{% if tools is none %}!{% endif %}"
    )
    messages = [{"role": "tool", "content": text} for text in ("<&>", "2", "3")]
    assert chatml(source).render(messages) == '"<&>"\n"2"\n{\n "a": "<中>"\n}!'


# --- files


def test_load_from_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"tasks.template: .*missing' does not exist"):
        ChatTemplate.load(tmp_path / "missing")
    assert ChatTemplate.load(tmp_path) == CHATML
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config | {"chat_template": BRACKETS}))
    for where in (tmp_path, path, tmp_path / "tokenizer.json"):
        (tmp_path / "tokenizer.json").touch()
        template = ChatTemplate.load(where)
        assert (template.source, template.tokens) == (BRACKETS, TOKENS)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TURNS}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    assert ChatTemplate.load(tmp_path).source == TURNS
    path.write_text(json.dumps(config | {"chat_template": named[:1]}))
    with pytest.raises(ValueError, match="holds the templates tool_use"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(HEADERS)
    assert ChatTemplate.load(tmp_path).source == HEADERS
    assert ChatTemplate.load(tmp_path / "chat_template.jinja").tokens == TOKENS


def test_save_and_load(tmp_path):
    template = chatml(HEADERS)
    template.save(tmp_path)
    again = ChatTemplate.load(tmp_path)
    assert again.render(CONVERSATION) == template.render(CONVERSATION)
    assert again.fingerprint == template.fingerprint != CHATML.fingerprint


# --- what is refused


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (BRACKETS, "Roles must alternate user, assistant"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ messages[0].content.a.b }}", "has no attribute 'a'"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% set ns = namespace(__html__='{0}'.format) %}", "cannot hold '__html__'"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "cannot hold '__html__'"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_one_line_with_file_and_row(source, reason, tokenizer):
    messages = [*turns("a", "b"), {"role": "assistant", "content": "c"}]
    with pytest.raises(ValueError) as error:
        encode_chat(messages, tokenizer, chatml(source), 100, "rows.jsonl:3")
    text = str(error.value)
    start = "tasks.template: t.jinja: rows.jsonl:3: messages: template says: "
    assert text.startswith(start) and reason in text and "\n" not in text


_DOUBLED = "{% set n = namespace(x='aa') %}{% for i in range(99) %}STEP{% endfor %}"


@pytest.mark.parametrize(
    "use",
    [
        "{{ x }}", "{{ n }}", "{{ 'a' ~ x }}", "{{ '%s' % (x,) }}", "{{ x | tojson }}",
        "{{ [x] | join }}", "{{ x | upper }}", "{{ '' if x == n.y }}", "{{ x in [n.y] }}",
        "{{ x is eq(n.y) }}", "{{ {}[x] }}", "{{ {x: 1} }}", "{{ {'a': x}.values() }}",
        "{{ {}.get(x) }}", "{{ [x, n.y] | unique | list }}",
        "{{ ([[1]] * 60000) | sum(start=[]) }}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("twice", ["({0}, {0})", "[{0}, {0}]"])
def test_a_template_cannot_use_what_holds_itself_twice_and_so_on(use, twice):
    """40 lines make it; to write it or to compare two of them would take for ever."""
    step = f"{{% set n.x = {twice.format('n.x')} %}}{{% set n.y = {twice.format('n.y')} %}}"
    made = f"{{% for i in range(40) %}}{step}{{% endfor %}}{{% set x = n.x %}}"
    source = "{% set n = namespace(x=('a',), y=('a',)) %}" + made + use
    with pytest.raises(ValueError, match=r"it would make|sum adds|unhashable"):
        ChatTemplate(source, "mine").render([])


@pytest.mark.parametrize(
    "step",
    [
        "{% set n.x = n.x + n.x %}", "{% set n.x = n.x ~ n.x %}", "{% set n.x = n.x * 2 %}",
        "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}",
        "{% macro m() %}{{ n.x }}{{ n.x }}{% endmacro %}{% set n.x = m() %}",
        "{% set n.x = n.x.replace('a', 'aa') %}", "{% set n.x = n.x | replace('a', 'aa') %}",
        "{% set n.x = ''.join([n.x, n.x]) %}", "{% set n.x = [n.x, n.x] | join %}",
        "{% set n.x = '%s%s' % (n.x, n.x) %}", "{% set n.x = '%s%s' | format(n.x, n.x) %}",
        "{% set n.x = '{0}{0}'.format(n.x) %}", "{% set n.x = [n.x, n.x] | string %}",
        "{% set n.x = [n.x, n.x] | tojson %}", "{{ 'a' * 10**9 }}", "{{ 10 ** (10 ** 8) }}",
        "{{ '%999999999d' % 1 }}", "{{ '%*d' % (10 ** 9, 1) }}", "{{ '{:>{}}'.format(1, 10**9) }}",
        "{{ 'a'.ljust(10 ** 9) }}", "{{ 'a'.encode() * 10 ** 9 }}", "{{ 'a' | indent(10 ** 9) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}", "{{ (1).to_bytes(10 ** 9) }}",
    ],
)  # fmt: skip
def test_a_template_cannot_fill_the_memory(step):
    """Each ends in a moment; what they ask for would take gigabytes or hours."""
    with pytest.raises(ValueError, match=r"it would make|cannot hold|is unsafe"):
        ChatTemplate(_DOUBLED.replace("STEP", step), "mine").render([])


def test_what_templates_do_is_what_jinja_does():
    source = (
        "{{ 'a' * 3 }}{{ '%s=%d' % ('x', 1) }}{{ '{:>3}'.format(1) }}{{ 'a' + 'b' ~ 1 ~ none }}"
        "{{ ['a', 'b'] | join(', ') }}{{ 'aab'.replace('a', 'c') }}{{ 2 ** 10 }}{{ 2 ** -1 }}"
        "{{ 'a\nb' | indent(2) }}{{ '%s' | format(7) }}{{ {'a': [1]} | tojson(indent=1) }}"
        "{% set x %}<{{ 1 }}>{% endset %}{{ x ~ x }}{{ 5 | string }}{{ ' a b'.strip().split() }}"
        "{{ 1 < 2 < 3 }}{{ 'a' in 'ab' }}{{ 1 not in [2] }}{{ {(1, 2): [3], 'b': {}} }}"
        "{{ [1, 2] | sum }}{{ [1, 2] | select('odd') | map('string') | join }}{{ {1: 2}[1] }}"
    )
    plain = jinja2.Environment()
    plain.filters["tojson"] = json.dumps
    assert ChatTemplate(source, "mine").render([]) == plain.from_string(source).render()


def test_a_template_with_a_wrong_tag_names_the_line():
    with pytest.raises(ValueError, match=r"tasks.template: t.jinja: line 2: .*'endfor'"):
        chatml("{% if 1 %}\n{% endfor %}")


def test_a_template_that_rewrites_earlier_turns_must_mark_them(tokenizer):
    short = (
        "{% for m in messages %}{{ m.role }}"
        "{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"t.jinja: r:1: messages\[1\]: .* generation"):
        encode_chat(turns("a", "b", "c", "d"), tokenizer, chatml(short), 100, "r:1")
    marked = short.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    record = encode_chat(turns("a", "b", "c", "d"), tokenizer, chatml(marked), 100)
    assert learned_text(tokenizer, record) == "d"
    upper = "{% filter replace('\ufdd0', '') %}" + marked + "{% endfilter %}"
    with pytest.raises(ValueError, match="changes the text of a"):
        encode_chat(turns("a", "b"), tokenizer, chatml(upper), 100)
    unmarked = "{% if false %}{% generation %}{% endgeneration %}{% endif %}x"
    with pytest.raises(ValueError, match="marks nothing"):
        encode_chat(turns("a", "b"), tokenizer, chatml(unmarked), 100)


def test_a_turn_that_nothing_ends_is_refused(tokenizer):
    endless = "{% for m in messages %}<turn>{{ m.role + ' ' + m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"messages\[1\]: nothing ends this turn"):
        encode_chat(turns("a", "b"), tokenizer, chatml(endless), 100)


def test_a_token_behind_the_whole_text(tokenizer):
    record = encode_chat(turns("a", "b", "c", "d"), tokenizer, chatml(LAST_EOS), 100)
    assert learned_text(tokenizer, record) == "b<|im_end|>d<|im_end|>\n</s>"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "messages: nothing where a list"),
        ([], "messages: nothing where a list"),
        ("hello", "messages: str where a list"),
        (["hello"], r"messages\[0\]: str, not role and content"),
        ([{"role": "bot", "content": "a"}], r"messages\[0\].role: 'bot' is none of system, user"),
        ([{"content": "a"}], r"messages\[0\].role: None is none of"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: int, not text"),
        (turns("a"), r"messages\[0\].role: 'user', but the assistant must come last"),
        (turns("a", "b", "<|im_end|>", "d"), r"messages\[2\].content: .*'<\|im_end\|>'.* forge"),
        (turns("a", "b<|endoftext|>"), r"messages\[1\].content: .*'<\|endoftext\|>'"),
        ([{"role": "user", "content": "a", "name": ["</s>"]}], r"messages\[0\].name: .*'</s>'"),
        (turns("a\ud800", "b"), r"messages\[0\].content: character 1 is half of a surrogate"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(messages, problem, tokenizer):
    with pytest.raises(ValueError, match=r"^tasks.chat: rows.jsonl:7: " + problem):
        encode_chat(messages, tokenizer, CHATML, 100, "tasks.chat: rows.jsonl:7")


def test_the_built_in_template_needs_its_tokens():
    with pytest.raises(ValueError, match=r"^data.special_tokens: .*needs <\|im_start\|>, "):
        encode_chat(turns("a", "b"), byte_tokenizer(), CHATML, 100)
    check_messages(turns("<|im_end|>", "b"), byte_tokenizer())  # ordinary text to this tokenizer


# --- length


def test_a_long_conversation_loses_its_first_turns_but_not_its_system_message(tokenizer):
    contents = [f"{i}" * 10 for i in range(9)] + ["end"]
    sizes = []
    for seq_len in range(1, 330):
        messages = turns(*contents, system="S" * 5)
        record = encode_chat(messages, tokenizer, CHATML, seq_len)
        if record is None:
            continue
        kept = tokenizer.decode(record["tokens"], skip_special_tokens=False)
        assert kept.startswith("<|im_start|>system\nSSSSS<|im_end|>\n<|im_start|>user\n")
        assert len(record["tokens"]) <= seq_len and kept.endswith("end")
        if not sizes or len(record["tokens"]) != sizes[-1][1]:
            sizes.append((seq_len, len(record["tokens"])))
    assert len(sizes) == 5  # of five exchanges 1, 2, ... 5
    assert all(first == size for first, size in sizes)  # as soon as it fits


# --- preferences


def halves(record):
    return [
        {name: value[record["segment_ids"] == segment] for name, value in record.items()}
        for segment in (1, 2)
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "good", "rejected": "bad!!"},
        {
            "prompt": turns("x", "y", "hi"),
            "chosen": {"role": "assistant", "content": "good"},
            "rejected": [{"role": "assistant", "content": "bad!!"}],
        },
    ],
)
@pytest.mark.parametrize("style", ["chatml", "built-in"])
def test_a_pair_is_two_segments_with_loss_on_the_answers(row, style, tokenizer):
    source, learned = STYLES[style]
    record = encode_preference(row, tokenizer, chatml(source), 400)
    chosen, rejected = halves(record)
    assert learned_text(tokenizer, chosen) == learned.format("good")
    assert learned_text(tokenizer, rejected) == learned.format("bad!!")
    assert set(record["segment_ids"]) == {1, 2}
    for half in (chosen, rejected):
        assert half["positions"].tolist() == list(range(len(half["tokens"])))
        assert half["targets"][:-1].tolist() == half["tokens"][1:].tolist()
        prompt = row["prompt"] if isinstance(row["prompt"], list) else turns(row["prompt"])
        ids = encode_prompt(prompt, tokenizer, chatml(source))
        assert half["tokens"][: len(ids)].tolist() == ids


def test_a_pair_of_texts(tokenizer):
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "<|im_end|>"}
    eos = tokenizer.eos_token
    chosen, rejected = halves(encode_preference(row, tokenizer, None, 64))
    assert tokenizer.decode(chosen["tokens"], skip_special_tokens=False) == f"{eos}2+2=4"
    assert learned_text(tokenizer, chosen) == f"4{eos}"
    assert learned_text(tokenizer, rejected) == f"<|im_end|>{eos}"  # text, not the token
    assert tokenizer.token_id("<|im_end|>") not in rejected["targets"]


@pytest.mark.parametrize("seq_len", [9, 10, 11, 15, 28, 29, 30, 50])
def test_of_a_long_prompt_the_end_stays(seq_len, tokenizer):
    row = {"prompt": "0123456789", "chosen": "ab", "rejected": "cde"}
    record = encode_preference(row, tokenizer, None, seq_len)
    room = seq_len // 2 - len("cde") - 1
    if room < 1:
        assert record is None
        return
    for half, answer in zip(halves(record), ("ab", "cde"), strict=True):
        assert len(half["tokens"]) <= seq_len // 2
        assert half["tokens"][0] == tokenizer.eos_id
        assert tokenizer.decode(half["tokens"]) == "0123456789"[-room:] + answer
        assert learned_text(tokenizer, half) == answer + tokenizer.eos_token


def test_a_long_chat_prompt_loses_turns_of_both_segments(tokenizer):
    row = {"prompt": turns("old " * 9, "y", "new"), "chosen": "a", "rejected": "b" * 9}
    whole = encode_preference(row, tokenizer, CHATML, 400)
    size = max(len(half["tokens"]) for half in halves(whole))
    assert (
        encode_preference(row, tokenizer, CHATML, 2 * size)["tokens"].size == whole["tokens"].size
    )
    chosen, rejected = halves(encode_preference(row, tokenizer, CHATML, 2 * size - 1))
    for half in (chosen, rejected):
        assert tokenizer.decode(half["tokens"]).startswith("user\nnew\nassistant\n")
    assert encode_preference(row, tokenizer, CHATML, 2 * len(rejected["tokens"]) - 1) is None


@pytest.mark.parametrize(
    ("row", "templated", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, False, "rejected: nothing where text should"),
        ({"prompt": turns("a"), "chosen": "b", "rejected": "c"}, False, "prompt: list where"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, True, "prompt: int where text or"),
        ({"prompt": "a", "chosen": "<s>", "rejected": "c"}, True, r"chosen\[0\].content: .*<s>"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, True, "prompt: nothing where"),
        ({"prompt": "a", "chosen": "b", "rejected": turns("c")}, True, r"rejected\[0\].role: 'us"),
    ],
)
def test_a_bad_pair_is_named_by_file_row_and_field(row, templated, problem, tokenizer):
    with pytest.raises(ValueError, match=r"^tasks.pairs: pairs.jsonl:2: " + problem):
        encode_preference(
            row, tokenizer, CHATML if templated else None, 64, "tasks.pairs: pairs.jsonl:2"
        )


# --- packing

LENGTH = 128


@pytest.fixture(scope="module")
def packed(tokenizer):
    """A row of two conversations and a pair, and the segment of each of its places."""
    records = [
        encode_chat(turns("a", "b", "c", "d"), tokenizer, CHATML, 100),
        encode_preference({"prompt": "e", "chosen": "f", "rejected": "gh"}, tokenizer, CHATML, 100),
        encode_chat(turns("i", "j", system="k"), tokenizer, CHATML, 100),
    ]
    return Layout(LENGTH).collate([records]), records


def test_packed_conversations_are_segments_of_their_own(packed):
    batch, records = packed
    segments = batch["segment_ids"][0]
    assert segments.max() == 4 and segments[-1] == 0
    lengths = [np.sum(r["segment_ids"] == n) for r in records for n in set(r["segment_ids"])]
    assert [np.sum(segments == n) for n in (1, 2, 3, 4)] == lengths
    for name in ("tokens", "targets", "loss_mask", "positions"):
        alone = np.concatenate([record[name] for record in records])
        assert np.array_equal(batch[name][0, : len(alone)], alone)
        assert not batch[name][0, len(alone) :].any()


def test_packed_conversations_do_not_see_each_other(packed):
    """By gradient: each place holds a token of its own, so a row of the table is a place."""
    batch = {**packed[0], "tokens": np.arange(LENGTH, dtype=np.int32)[None]}
    config = TransformerConfig(
        vocab_size=LENGTH, seq_len=LENGTH, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=16,
        head="none", init="gpt2",
    )  # fmt: skip
    model = Transformer(config, "cpu")
    params = jax.jit(lambda: nn.meta.unbox(init_params(model, jax.random.key(0))))()
    counted = batch["loss_mask"][0] * (batch["segment_ids"][0] == np.arange(1, 5)[:, None])

    def outputs(table):
        """f32[4]: what the learned places of each segment give."""
        features = forward(model, {**params, "tokens": table}, batch)[0]
        return counted @ (features @ jnp.sin(jnp.arange(8.0) ** 2))

    influence = np.abs(jax.jit(jax.jacrev(outputs))(params["tokens"])).sum(-1)  # segment, place
    for n in range(1, 5):
        places = batch["segment_ids"][0] == n
        last = np.flatnonzero(places & (batch["loss_mask"][0] > 0))[-1]
        inside = places & (np.arange(LENGTH) <= last)
        assert (influence[n - 1, inside] > 0).all()
        assert (influence[n - 1, ~inside] == 0).all()


# --- against Hugging Face


@pytest.mark.peers
def test_hugging_face_renders_and_masks_the_same(style, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    template, _ = style
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), **TOKENS
    )
    source = template.source
    for messages in (CONVERSATION, CONVERSATION[1:3], turns("<&>", " x \n", "b\n", "\td")):
        for prompt in (False, True):
            text = theirs.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            assert text == template.render(messages, add_generation_prompt=prompt)
        record = encode_chat(messages, tokenizer, template, 400)
        encoded = theirs.apply_chat_template(
            messages,
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask="endgeneration" in source,
        )
        size = len(record["tokens"])
        assert record["tokens"].tolist() == encoded["input_ids"][:size]
        if "endgeneration" in source:
            mask = encoded["assistant_masks"]
            assert record["loss_mask"].tolist() == mask[1 : size + 1]
            assert not any(mask[size + 1 :])
