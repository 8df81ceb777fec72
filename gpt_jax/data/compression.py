"""Bits per byte of general compressors: the yardstick for a language model of the same text."""

import lzma
import zlib
from collections.abc import Iterable


def compression_bits_per_byte(documents: Iterable[str]) -> dict[str, float]:
    """How well zlib and lzma do on a corpus.

    Args:
      documents: texts; their UTF-8 bytes are what is compressed.  All are held in memory.

    Returns:
      Bits per byte under `zlib_each`, `zlib_all`, `lzma_each`, `lzma_all`: each document alone,
      and all of them in one stream.  zlib at level 9, lzma at preset 9 with EXTREME.

    Raises:
      ValueError: there is no text.
    """
    texts = [text.encode() for text in documents]
    num_bytes = sum(map(len, texts))
    if not num_bytes:
        raise ValueError("documents: there is no text to compress")
    joined = b"".join(texts)

    def bits(sizes):
        return 8 * sum(sizes) / num_bytes

    return {
        "zlib_each": bits(len(zlib.compress(text, 9)) for text in texts),
        "zlib_all": bits([len(zlib.compress(joined, 9))]),
        "lzma_each": bits(len(_lzma(text)) for text in texts),
        "lzma_all": bits([len(_lzma(joined))]),
    }


def _lzma(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
