"""How single tokens are written: most are a piece of text, some are part of a character."""

import re

from gpt_jax.data.tokenizers import Tokenizer


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens; each is found once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._is_byte_level = tokenizer.token_bytes() is not None
        self._bytes_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        self._known: dict[int, bytes] = {}

    def bytes(self, token_id: int) -> bytes:
        """What a token adds to a text; of a special token its name."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def text(self, token_id: int) -> str:
        """A token's text; "bytes:\\xe2\\x82" where it holds a part of a character."""
        found = self.bytes(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _find(self, token_id: int) -> bytes:
        # An added token is no text of the alphabet, whatever its characters are.
        name = self._tokenizer.token_text(token_id)
        if name in self._tokenizer.special_tokens:
            return name.encode()
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            if all(char in self._bytes_of for char in piece):
                found = bytes(self._bytes_of[char] for char in piece)
                if found.decode(errors="replace") == name:
                    return found
            return name.encode()
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(i) for i in range(256, 512))
    return [chr(byte) if byte in shown else next(others) for byte in range(256)]
