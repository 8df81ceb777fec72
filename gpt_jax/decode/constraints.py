"""Text that must be JSON of a schema, match a regex or follow a grammar, by llguidance's masks.

A compiled constraint is shared: each sample gets a copy of it. Needs the extra `serve`.
"""

import functools
import json
import threading
from collections.abc import Callable, Sequence

import numpy as np

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.request import Constraint

# What strangers may ask for. Real schemas of tools have some 10,000 characters and 10 levels; the
# time that llguidance takes for a regex grows as the square of its length.
MAX_CHARS = {"json_schema": 1 << 16, "regex": 1 << 12, "grammar": 1 << 14}
MAX_DEPTH = 64
# llguidance's own limits; its defaults let one schema take half a gigabyte of lexer states.
_LIMITS = {
    "max_grammar_size": 100_000,
    "max_lexer_states": 50_000,
    "max_items_in_row": 2_000,
    "step_max_items": 50_000,
    "verbose_errors": False,
}
# JSON and nothing else, whatever the schema's "x-guidance" says. A model that is not sure of what
# comes next would write white space for ever if it might.
_JSON_OPTIONS = {
    "whitespace_pattern": r"[ \n\t]{1,16}",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
# Its compiler calls itself once for every link of a chain of rules or "$ref"s: a few thousand
# overflow a usual stack, which ends the process. MAX_CHARS holds no chain too long for this one.
_STACK_BYTES = 256 << 20

ConstraintFactory = Callable[[], Constraint]


class MaskConstraint:
    """A Constraint that asks a matcher of llguidance.

    Attributes:
      failure: "" or why the matcher gave up before the text was complete (a limit); the ids that
        end a text are then the only ones allowed.
    """

    def __init__(self, matcher, eos_ids: Sequence[int], vocab_size: int):
        self._matcher = matcher
        self._eos_ids = list(eos_ids)
        self._vocab_size = vocab_size
        self.failure = ""

    def allowed(self) -> np.ndarray:
        """bool[V]; an id that ends the text is allowed where the text is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        allowed_V = np.pad(allowed_V, (0, self._vocab_size - len(allowed_V)))
        if self._matcher.is_error() or not allowed_V.any():
            self.failure = self.failure or self._matcher.get_error() or "no token can follow"
            allowed_V[:] = False
            allowed_V[self._eos_ids] = True
        return allowed_V

    def accept(self, token_id: int) -> None:
        """Goes on by a token that was allowed."""
        if not self.failure and not self._matcher.consume_token(int(token_id)):
            self.failure = self._matcher.get_error() or "the token is not allowed"


def end_reason(make: ConstraintFactory | None, ids: Sequence[int]) -> str:
    """Why a text ended at an id that ends texts: "stop", or "length" where it is not complete.

    A matcher that gives up at one of its limits lets a text end; who reads it must be told.

    Args:
      make: What the text was held to; None: nothing.
      ids: All of it, with the one that ended it.
    """
    if make is None:
        return "stop"
    constraint = make()
    for token_id in ids:
        constraint.accept(token_id)
    return "length" if getattr(constraint, "failure", "") else "stop"


def json_schema_constraint(
    tokenizer: Tokenizer, schema: dict, *, eos_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> ConstraintFactory:  # fmt: skip
    """JSON that a JSON schema describes; {"type": "object"}: any JSON object.

    Args:
      tokenizer: Of the model.
      schema: A schema as json.loads gives it; keywords that could not be kept to are refused.
      eos_ids: The ids that end a text; None: the tokenizer's own.
      vocab_size: V of the masks, where the model has more ids than the tokenizer; those beyond
        it are never allowed.

    Returns:
      What makes a sample's Constraint.

    Raises:
      ValueError: The schema is none, is too large or not supported, no token can begin it, the
        tokenizer's tokens do not stand for bytes, or llguidance is not installed.
    """
    field = "json_schema"
    if not isinstance(schema, dict):
        raise ValueError(f"{field}: a {type(schema).__name__} is not a JSON schema")
    _check_depth(schema)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: {error}") from None
    return _factory(tokenizer, "json_schema", text, eos_ids, vocab_size)


def regex_constraint(
    tokenizer: Tokenizer, regex: str, *, eos_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> ConstraintFactory:  # fmt: skip
    """Text that a regex (Rust's syntax: no look-around, no backreferences) matches as a whole.

    Args, returns and raises as json_schema_constraint.
    """
    return _factory(tokenizer, "regex", regex, eos_ids, vocab_size)


def grammar_constraint(
    tokenizer: Tokenizer, grammar: str, *, eos_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> ConstraintFactory:  # fmt: skip
    """Text of a context-free grammar in llguidance's dialect of Lark; its first rule is `start`.

    Args, returns and raises as json_schema_constraint.
    """
    return _factory(tokenizer, "grammar", grammar, eos_ids, vocab_size)


def _factory(tokenizer, kind: str, text: str, eos_ids, vocab_size) -> ConstraintFactory:
    field = kind
    if not isinstance(text, str):
        raise ValueError(f"{field}: a {type(text).__name__} is not a string")
    if len(text) > MAX_CHARS[kind]:
        raise ValueError(f"{field}: {len(text)} characters; at most {MAX_CHARS[kind]} are allowed")
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{field}: needs llguidance, which is not installed: pip install 'gpt-jax[serve]'"
        ) from None
    eos_ids = (tokenizer.eos_id,) if eos_ids is None else tuple(eos_ids)
    eos_ids = tuple(i for i in eos_ids if i < tokenizer.vocab_size)
    assert eos_ids, "a text that is complete must be able to end"
    vocab_size = vocab_size or tokenizer.vocab_size
    try:
        matcher = _on_deep_stack(lambda: _compile(_ll_tokenizer(tokenizer, eos_ids), kind, text))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None

    def make() -> MaskConstraint:
        return MaskConstraint(matcher.deep_copy(), eos_ids, vocab_size)

    # That nothing matches shows only in the first mask, and some limits behind the first token.
    probe = make()
    token_id = int(np.argmax(probe.allowed()))
    probe.accept(token_id)
    if probe.failure:
        raise ValueError(f"{field}: {_one_line(probe.failure)}")
    return make


def _compile(ll_tokenizer, kind: str, text: str):
    """A matcher of llguidance at the start of a text; ValueError where it is in error."""
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json_schema":
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    elif kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    else:
        grammar = LLMatcher.grammar_from_lark(text)
    matcher = LLMatcher(ll_tokenizer, grammar, limits=LLParserLimits(**_LIMITS), log_level=0)
    if matcher.is_error():
        raise ValueError(_one_line(matcher.get_error()))
    return matcher


@functools.lru_cache(maxsize=4)
def _ll_tokenizer(tokenizer: Tokenizer, eos_ids: tuple[int, ...]):
    """llguidance's view of a tokenizer: the bytes of each id. 0.2 s for 49,152 ids."""
    from llguidance import LLTokenizer

    form = json.loads(tokenizer.json)
    if (form.get("decoder") or {}).get("type") == "Metaspace":
        # The same decoding in the parts that llguidance knows.
        space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        parts = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
        form["decoder"] = {"type": "Sequence", "decoders": parts}
    try:
        return LLTokenizer(
            json.dumps(form), n_vocab=tokenizer.vocab_size, eos_token=list(eos_ids)
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"this model's tokens do not stand for bytes, so its text cannot be held to a form: "
            f"{_one_line(str(error))}"
        ) from None


def _on_deep_stack(work: Callable):
    """What `work` returns, called in a thread with a stack of _STACK_BYTES."""
    results, errors = [], []

    def run():
        try:
            results.append(work())
        # A panic in Rust is no Exception; nobody interrupts this thread.
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    before = threading.stack_size(_STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if errors:
        raise ValueError(_one_line(str(errors[0]))) from errors[0]
    return results[0]


def _check_depth(schema: dict) -> None:
    level = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list | tuple)
        ]
    if level:
        raise ValueError(f"json_schema: nested deeper than {MAX_DEPTH} levels")


def _one_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
