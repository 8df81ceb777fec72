"""Texts that grow while they are generated, and what they cost."""

from collections.abc import Sequence

from gpt_jax.serve.generation import Generation, Piece
from gpt_jax.serve.logprobs import Aligner, Placed


class Choice:
    """One text, as it grows.

    Attributes:
      text: So far.
      placed: Its tokens, if it has an aligner.
      aligner: Places tokens; None: nobody asked where they are.
      finish_reason: Why it ended; None while it goes on.
      num_tokens: Generated, those of a stop string and the one that ended it among them.
      logprob: The sum of theirs.
    """

    def __init__(self):
        self.text = ""
        self.placed: list[Placed] = []
        self.aligner: Aligner | None = None
        self.finish_reason: str | None = None
        self.num_tokens = 0
        self.logprob = 0.0

    def put(self, piece: Piece) -> list[Placed]:
        """The tokens that can be shown now."""
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.num_tokens += len(piece.tokens)
        self.logprob += sum(token.logprob for token in piece.tokens)
        placed = self.aligner.put(piece) if self.aligner is not None else []
        self.placed += placed
        return placed


def usage(generation: Generation, choices: Sequence[Choice]) -> dict:
    """Tokens read and written; a prompt counts once, however many texts continue it."""
    read = sum(len(request.prompt) for request in generation.prompted.requests)
    written = sum(choice.num_tokens for choice in choices)
    cached = sum(job.cached_tokens for job in generation.jobs)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
