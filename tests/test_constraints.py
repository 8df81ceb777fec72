"""What a constraint allows, sampled by a model that knows nothing: random logits."""

import json
import re

import numpy as np
import pytest
import tokenizers as hf

from gpt_jax.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from gpt_jax.decode.constraints import (
    grammar_constraint,
    json_schema_constraint,
    regex_constraint,
)

pytest.importorskip("llguidance")

BYTES = byte_tokenizer()


def sample(tokenizer, factory, rng, max_tokens=2000):
    """The text that random logits write under a constraint, and whether it ended."""
    constraint, ids = factory(), []
    for _ in range(max_tokens):
        allowed_V = constraint.allowed()
        token_id = int(rng.choice(np.flatnonzero(allowed_V)))
        if token_id == tokenizer.eos_id:
            assert not constraint.failure
            return tokenizer.decode(ids), True
        constraint.accept(token_id)
        ids.append(token_id)
    return tokenizer.decode(ids), False


def random_schema(rng, depth=0):
    """A schema whose values have a bounded length, but for the digits of numbers."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["object", "array", "anyOf"] * (depth < 2)
    match kinds[rng.integers(len(kinds))]:
        case "string":
            low = int(rng.integers(0, 4))
            return {"type": "string", "minLength": low, "maxLength": low + int(rng.integers(0, 6))}
        case "pattern":
            return {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$"}
        case "integer":
            low = int(rng.integers(-500, 500))
            high = low + int(rng.integers(0, 900))
            return {"type": "integer", "minimum": low, "maximum": high}
        case "enum":
            return {"enum": ["red", "grün", 3, None, [1, {"a": True}]]}
        case "const":
            return {"const": {"kind": "point", "at": [0.5, -1]}}
        case "object":
            names = [f"p{i}" for i in range(rng.integers(0, 4))]
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": names[: rng.integers(0, len(names) + 1)],
                "additionalProperties": False,
            }
        case "array":
            low = int(rng.integers(0, 3))
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
        case simple:
            return {"type": simple}


TYPES = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None),
    "object": dict, "array": list,
}  # fmt: skip


def is_valid(value, schema):
    """Whether a JSON value keeps to a schema of random_schema."""
    if "anyOf" in schema:
        return any(is_valid(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        # Their JSON text tells 1 from true.
        choices = schema.get("enum", [schema.get("const")])
        return json.dumps(value) in [json.dumps(choice) for choice in choices]
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    match kind:
        case "string":
            matches = re.fullmatch(schema.get("pattern", "(?s).*").strip("^$"), value)
            return bool(matches) and (
                schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            )
        case "integer":
            return schema["minimum"] <= value <= schema["maximum"]
        case "array":
            fits = schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(is_valid(item, schema["items"]) for item in value)
        case "object":
            properties = schema["properties"]
            known = set(schema["required"]) <= set(value) <= set(properties)
            return known and all(is_valid(item, properties[name]) for name, item in value.items())
    return True


def test_200_of_200_texts_of_sampled_schemas_are_valid():
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(40):
        schema = random_schema(rng)
        factory = json_schema_constraint(BYTES, schema)
        for _ in range(5):
            text, ended = sample(BYTES, factory, rng)
            assert ended and is_valid(json.loads(text), schema), (schema, text)
            lengths.add(len(text))
    assert len(lengths) > 30


def test_any_json_object():
    # Braces and quotes are rare among random bytes: what has no end is only checked as a beginning.
    factory = json_schema_constraint(BYTES, {"type": "object"})
    constraint = factory()
    assert np.flatnonzero(constraint.allowed()).tolist() == [ord("{")]
    for char in b'{"a": [1, {"b": null}], "c": "\xc3\xa9"}':
        assert constraint.allowed()[char]
        assert not constraint.allowed()[BYTES.eos_id]
        constraint.accept(char)
    assert constraint.allowed()[BYTES.eos_id]


def test_white_space_is_bounded():
    constraint = json_schema_constraint(BYTES, {"type": "object"})()
    constraint.accept(ord("{"))
    number = 0
    while constraint.allowed()[ord(" ")] and number < 100:
        constraint.accept(ord(" "))
        number += 1
    assert number == 16


def test_text_matches_a_regex_as_a_whole():
    rng = np.random.default_rng(0)
    regex = r"(yes|no), [0-9]{3}(\.[a-zé]{1,3})?"
    factory = regex_constraint(BYTES, regex)
    texts = [sample(BYTES, factory, rng)[0] for _ in range(50)]
    assert all(re.fullmatch(regex, text) for text in texts)
    assert {text[0] for text in texts} == {"y", "n"}


def test_text_follows_a_grammar():
    rng = np.random.default_rng(0)
    grammar = 'start: sum\nsum: NUMBER | "(" sum ("+" | "-") sum ")"\nNUMBER: /[1-9]/'
    factory = grammar_constraint(BYTES, grammar)
    for _ in range(30):
        text, ended = sample(BYTES, factory, rng, max_tokens=400)
        assert re.fullmatch(r"[-+()1-9]+", text)
        if ended:
            eval(text)  # the grammar's own alphabet only


def test_samples_of_one_request_do_not_know_of_each_other():
    factory = regex_constraint(BYTES, "ab|cd")
    first, second = factory(), factory()
    first.accept(ord("a"))
    assert np.flatnonzero(first.allowed()).tolist() == [ord("b")]
    assert np.flatnonzero(second.allowed()).tolist() == [ord("a"), ord("c")]
    first.accept(ord("b"))
    assert np.flatnonzero(first.allowed()).tolist() == [BYTES.eos_id]


def test_the_ids_that_end_a_text_are_the_model_s_and_padding_is_never_allowed():
    tokenizer = byte_tokenizer(("<|user|>", "<|im_end|>"))
    end = tokenizer.token_id("<|im_end|>")
    factory = regex_constraint(tokenizer, ".*", eos_ids=(end, tokenizer.eos_id), vocab_size=300)
    allowed_V = factory().allowed()
    assert allowed_V.shape == (300,) and allowed_V.dtype == bool
    assert allowed_V[end] and allowed_V[tokenizer.eos_id] and allowed_V[ord("x")]
    assert (
        not allowed_V[tokenizer.token_id("<|user|>")]
        and not allowed_V[tokenizer.vocab_size :].any()
    )
    only_end = regex_constraint(tokenizer, ".*", eos_ids=(end,))().allowed()
    assert only_end[end] and not only_end[tokenizer.eos_id]


def llama_tokenizer(decoder):
    """SentencePiece's alphabet: "▁" for a space, <0x0A> for a byte, and one of two decoders."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "a", "b", "▁a", "ab", "▁ab", "{", "}", '"', ":"]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    model = hf.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = hf.Tokenizer(model)
    tokenizer.normalizer = hf.normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoder
    special = [hf.AddedToken(name, special=True, normalized=False) for name in names[:3]]
    tokenizer.add_special_tokens(special)
    return Tokenizer(tokenizer, "</s>")


DECODERS = {
    "llama": hf.decoders.Sequence([
        hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(),
    ]),
    "t5": hf.decoders.Metaspace(prepend_scheme="never"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", *DECODERS])
def test_tokens_of_several_characters_and_other_alphabets(kind):
    if kind == "bpe":
        tokenizer = train_bpe(['{"a": "ab ab"} x' * 40], 300)
    else:
        tokenizer = llama_tokenizer(DECODERS[kind])
    factory = regex_constraint(tokenizer, r'\{"a": "(ab| ab|a){1,4}"\}')
    rng = np.random.default_rng(0)
    texts = set()
    for _ in range(20):
        constraint, ids = factory(), []
        while not ids or ids[-1] != tokenizer.eos_id:
            ids.append(int(rng.choice(np.flatnonzero(constraint.allowed()))))
            constraint.accept(ids[-1])
        # Bytes that stand for a character show only in a decoder that joins them.
        text = "".join(piece.decode() for piece in pieces(tokenizer, ids[:-1]))
        assert re.fullmatch(r'\{"a": "(ab| ab|a){1,4}"\}', text)
        texts.add(text)
        long = [i for i in ids[:-1] if len(tokenizer.token_text(i)) > 1]
    assert len(texts) > 5 and long


def pieces(tokenizer, ids):
    """The bytes of each id by its name in the vocabulary."""
    names = {i: name for name, i in tokenizer._tokenizer.get_vocab().items()}
    for i in ids:
        byte = re.fullmatch("<0x(..)>", names[i])
        named = names[i].replace("▁", " ").replace("Ġ", " ").encode()
        yield bytes([int(byte[1], 16)]) if byte else named


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused():
    words = hf.Tokenizer(hf.models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"^regex: this model's tokens do not stand for bytes"):
        regex_constraint(Tokenizer(words, "</s>"), "a")
