"""Log-probabilities beside texts: which token stands where, in the two shapes that OpenAI has."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.request import Token
from gpt_jax.serve.generation import Piece
from gpt_jax.serve.token_text import TokenTexts

# JSON has no infinity; OpenAI writes this for what cannot come.
_LEAST = -9999.0


class Placed(NamedTuple):
    """A token and the character of the text at which it begins.

    Attributes:
      token: Its log-probability is None where nothing stands before it.
      offset: Characters before it; within a character of several tokens, those before that one.
    """

    token: Token
    offset: int


class Aligner:
    """Places a text's tokens, and lets one go when its first character is let go."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0, before: Sequence[int] = ()):
        self._streamer = tokenizer.streamer(before)
        self._end = offset
        self._text_end = offset
        self._waiting: deque[Placed] = deque()

    def put(self, piece: Piece) -> list[Placed]:
        """Tokens whose text begins within the text so far; those of a stop string never come."""
        for token in piece.tokens:
            self._waiting.append(Placed(token, self._end))
            self._end += len(self._streamer.put(token.id))
        self._text_end += len(piece.text)
        if piece.by_id and self._waiting:
            self._waiting.pop()
        released = []
        ended = piece.finish_reason is not None and not piece.by_string
        while self._waiting and (ended or self._waiting[0].offset < self._text_end):
            released.append(self._waiting.popleft())
        return released


def prompt_offsets(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> tuple[str, list[int]]:
    """The text of an echoed prompt, and where each of its tokens begins in it."""
    if isinstance(prompt, str):
        _, spans = tokenizer.encode_with_offsets(prompt)
        return prompt, [start for start, _ in spans]
    streamer, offsets, text = tokenizer.streamer(), [], ""
    for token_id in prompt:
        offsets.append(len(text))
        text += streamer.put(token_id)
    return text + streamer.flush(), offsets


def completion_logprobs(placed: Sequence[Placed], top: int, texts: TokenTexts) -> dict:
    """The shape of /v1/completions.

    Args:
      placed: Tokens.
      top: How many of the most likely ones were asked for; the token itself is always among them.
      texts: How they are written.
    """
    tops = []
    for token, _ in placed:
        if token.logprob is None:
            tops.append(None)
            continue
        found: dict[str, float] = {}
        for token_id, logprob in token.top[:top]:
            found.setdefault(texts.text(token_id), _finite(logprob))
        # Clients compare this with the values beside it, so it must be the very same number.
        found[texts.text(token.id)] = _finite(token.logprob)
        tops.append(found)
    return {
        "tokens": [texts.text(token.id) for token, _ in placed],
        "token_logprobs": [_finite(token.logprob) for token, _ in placed],
        "top_logprobs": tops if top else None,
        "text_offset": [offset for _, offset in placed],
    }


def chat_logprobs(placed: Sequence[Placed], top: int, texts: TokenTexts) -> dict:
    """The shape of /v1/chat/completions."""

    def entry(token_id: int, logprob: float) -> dict:
        found = texts.bytes(token_id)
        return {
            "token": texts.text(token_id), "logprob": _finite(logprob), "bytes": list(found),
        }  # fmt: skip

    content = [
        entry(token.id, token.logprob)
        | {"top_logprobs": [entry(token_id, value) for token_id, value in token.top[:top]]}
        for token, _ in placed
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(float(logprob), _LEAST)
