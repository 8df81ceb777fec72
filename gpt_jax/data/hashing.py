"""Fingerprints of content, and a fast integer hash for choices that must not depend on order."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np

_BLOCK = 1 << 20


def digest(*parts) -> str:
    """A 32-digit hexadecimal blake2b of JSON-able parts; unambiguous about their borders."""
    data = json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    head = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(head, "little") / 2**64


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: uint64[...] -> uint64[...], a bijection that looks random."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def file_digest(path) -> str:
    """A hexadecimal blake2b of a file's bytes, read in blocks."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def file_digests(paths: list[str], cache_dir) -> list[str]:
    """Content digests of files, remembered by absolute path, size and modification time.

    Only what changed since the last call is read again, so a restart costs one `stat` a file.
    """
    paths = [os.path.abspath(path) for path in paths]
    memo_path = Path(cache_dir) / "digests" / f"{digest(os.path.commonpath(paths))}.json"
    try:
        memo = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    fresh = {}
    for path in paths:
        stat = os.stat(path)
        known = memo.get(path)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, file_digest(path)]
        fresh[path] = known
    if fresh != {path: memo.get(path) for path in paths}:
        write_atomically(memo_path, json.dumps(memo | fresh).encode())
    return [fresh[path][2] for path in paths]


def write_atomically(path, data: bytes) -> None:
    """Puts `data` at `path` in one step: a reader sees the old file, or all of the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, so that hosts which share the folder do not write into one another's file.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
