"""Tensors of files by name, read and written one at a time.  No torch, no pickle, no JAX."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
import safetensors

from gpt_jax.convert.json_files import read_json

_FLOATS = ("F64", "F32", "F16", "BF16")
# What we write: name -> (safetensors' name, numpy's).
DTYPES = {
    "float32": ("F32", np.dtype("<f4")),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensors(Protocol):
    """What a reader of files offers.

    Attributes:
      where: Named in errors.
    """

    where: str

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; ValueError if its numbers are of a kind that `read` cannot read."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32."""
        ...


@dataclasses.dataclass(frozen=True)
class _Stored:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafeTensors:
    """model.safetensors of a folder, or the shards that model.safetensors.index.json lists."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        index = folder / INDEX
        listed = _weight_map(index) if index.is_file() else {}
        files = sorted(set(listed.values())) if listed else [_single_file(folder)]
        self._stored: dict[str, _Stored] = {}
        for file in files:
            if not file.is_file():
                raise ValueError(f"init.source: {file} is missing, though {index.name} lists it")
            for name, stored in _header(file).items():
                if listed.get(name, file) == file:
                    self._stored[name] = stored
        for name in listed.keys() - self._stored.keys():
            raise ValueError(
                f"init.source: {listed[name]} lacks {name}, though {index.name} lists it there"
            )

    def names(self) -> list[str]:
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        if stored.dtype not in _FLOATS:
            raise ValueError(
                f"init.source: {stored.file}: {name} is {stored.dtype}, not one of "
                f"{', '.join(_FLOATS)}"
            )
        return stored.shape

    def read(self, name: str) -> np.ndarray:
        # Opened anew: the pages that a mapping has read stay in memory as long as it is open.
        with safetensors.safe_open(self._stored[name].file, framework="numpy") as file:
            return file.get_tensor(name).astype(np.float32, copy=False)


def _header(file: Path) -> dict[str, _Stored]:
    """What a file holds; the library checks that its tensors lie in it side by side."""
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: _Stored(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            }
    except safetensors.SafetensorError as error:
        cut = _cut_off(file) or f"is no safetensors file: {error}"
        raise ValueError(f"init.source: {file} {cut}") from None


def _cut_off(file: Path) -> str:
    """What a file lacks that ends too early; "" for another defect."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if start > size:
            return ""
        try:
            header = json.loads(opened.read(start - 8))
            ends = {name: start + tensor["data_offsets"][1] for name, tensor in header.items()
                    if name != "__metadata__"}  # fmt: skip
            short = [name for name in ends if ends[name] > size]
        except (ValueError, LookupError, TypeError, AttributeError):
            return ""
    if not short:
        return ""
    first = min(short, key=ends.get)
    return f"is cut off: {first} would end at byte {ends[first]}, but the file does at {size}"


def _single_file(folder: Path) -> Path:
    single = folder / SINGLE
    if single.is_file():
        return single
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"init.source: {folder} holds {pickles[0]}, a pickle, which can run any program when "
            "it is read; save the model as model.safetensors"
        )
    raise ValueError(f"init.source: {folder} holds no model.safetensors")


def _weight_map(index: Path) -> dict[str, Path]:
    """Tensor -> shard, which lies beside the index."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"init.source: {index} holds no weight_map")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(
                f"init.source: {index}: {name} is said to be in {shard!r}, which is no file name"
            )
    return {name: index.parent / shard for name, shard in shards.items()}


class Renamed:
    """Tensors under other names, without those that are left out.

    Attributes:
      where: As that of `tensors`.
    """

    def __init__(self, tensors: Tensors, actual: dict[str, str]):
        """`actual`: the tensor's name here -> its name in `tensors`."""
        self.where = tensors.where
        self._tensors, self._actual = tensors, actual

    def names(self) -> list[str]:
        return list(self._actual)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._actual[name])

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(self._actual[name])


@dataclasses.dataclass(frozen=True)
class ToWrite:
    """A tensor to write.

    Attributes:
      name: Its name.
      shape: Its shape.
      read: Gives it when it is to be written, in whatever dtype.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_safetensors(
    folder: Path, tensors: Iterable[ToWrite], dtype: str, shard_size: int
) -> list[str]:
    """Writes model.safetensors, or shards and an index where one file would be too large.

    Args:
      folder: Where to.
      tensors: All of them; each is in memory only while it is written.
      dtype: One of DTYPES; to bfloat16 numbers are rounded to the nearest.
      shard_size: Bytes of a file, but for a single tensor that is larger.

    Returns:
      The names of the files.
    """
    shards: list[list[ToWrite]] = []
    left, total = 0, 0
    for tensor in tensors:
        size = _num_bytes(tensor, dtype)
        if not shards or size > left:
            shards.append([])
            left = shard_size
        shards[-1].append(tensor)
        left, total = left - size, total + size
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, dtype)
    if count > 1:
        where = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return files


def _write_file(path: Path, tensors: Sequence[ToWrite], dtype: str) -> None:
    """The format: 8 bytes that give the length of a JSON header, the header, the numbers."""
    name, numpy_dtype = DTYPES[dtype]
    # transformers 4 asks for the format.
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        end = start + _num_bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read(), numpy_dtype)
            assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
            file.write(array.reshape(-1).view(np.uint8).data)


def _num_bytes(tensor: ToWrite, dtype: str) -> int:
    return math.prod(tensor.shape) * DTYPES[dtype][1].itemsize
