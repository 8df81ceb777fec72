"""What a request waits for: pieces of its texts, from the thread that generates them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from gpt_jax.decode.request import Request, Token
from gpt_jax.serve.errors import ApiError, too_long


class Piece(NamedTuple):
    """What is new in one text.

    Attributes:
      prompt, sample: Which: the prompt's number and that of its continuation.
      text: What follows the piece before; whole characters.
      tokens: What was generated since the piece before; their text may still be held back.
      finish_reason: None, or in the text's last piece why it ended.
      by_string: It ended before a stop string; tokens of that are among `tokens`.
      by_id: The last token ended it and is no part of the text.
    """

    prompt: int
    sample: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None
    by_string: bool = False
    by_id: bool = False


class Prompted(NamedTuple):
    """Texts to generate together.

    Attributes:
      requests: One a prompt.
      end_ids: Ids that end a text and are no part of it.
      streams: Whether each token is wanted as soon as it is there.
      continues: Whether the texts go on where the prompts end; else they are answers.
    """

    requests: Sequence[Request]
    end_ids: tuple[int, ...]
    streams: bool
    continues: bool = False


class Generation:
    """Texts that are being generated, seen from the event loop.

    Attributes:
      jobs: The engine's, one a prompt; complete when the first piece comes.
    """

    def __init__(
        self, prompted: Prompted, on_cancel: Callable[["Generation"], None], timeout: float
    ):
        """
        Args:
          prompted: What is generated.
          on_cancel: Called once, if it ends before all texts have.
          timeout: Seconds that all pieces may take together.
        """
        self.prompted = prompted
        self.jobs: list = []
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self._waiting: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self._on_cancel, self._timeout = on_cancel, timeout
        self._left = sum(request.params.n for request in prompted.requests)

    def put(self, item: Piece | ApiError) -> None:
        """Called in the event loop."""
        self._waiting.put_nowait(item)

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces until every text has ended.

        Raises:
          ApiError: what generates failed, or took too long.
        """
        deadline = self.loop.time() + self._timeout
        try:
            while self._left:
                try:
                    async with asyncio.timeout_at(deadline):
                        item = await self._waiting.get()
                except TimeoutError:
                    raise too_long(self._timeout) from None
                if isinstance(item, ApiError):
                    self._left = 0
                    raise item
                self._left -= item.finish_reason is not None
                yield item
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Frees the slots; nothing where all texts have ended."""
        if self._left:
            self._left = 0
            self._on_cancel(self)
