"""Tensors of files by name, one at a time, as float32.  No torch, no pickle, no JAX."""

import json
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np
import safetensors

_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensors(Protocol):
    """What a reader of files offers.

    Attributes:
      where: Named in errors.
    """

    where: str

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32."""
        ...


class SafeTensors:
    """model.safetensors of a folder, or the shards that model.safetensors.index.json lists."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._files: dict[str, Any] = {}
        for file in _files(folder):
            try:
                opened = safetensors.safe_open(file, framework="numpy")
            except safetensors.SafetensorError as error:
                raise ValueError(f"init.source: {file} is no safetensors file: {error}") from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        dtype = self._files[name].get_slice(name).get_dtype()
        if dtype not in _FLOATS:
            raise ValueError(
                f"init.source: {self.where}: {name} is {dtype}, not one of {', '.join(_FLOATS)}"
            )
        return self._files[name].get_tensor(name).astype(np.float32)


def _files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        shards = _json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"init.source: {index} holds no weight_map")
        files = [folder / shard for shard in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise ValueError(f"init.source: {file} is missing, though {index.name} lists it")
        return files
    if single.is_file():
        return [single]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"init.source: {folder} holds {pickles[0]}, a pickle, which can run any program when "
            "it is read; save the model as model.safetensors"
        )
    raise ValueError(f"init.source: {folder} holds no model.safetensors")


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"init.source: {path} is no JSON: {error}") from None
    return values if isinstance(values, dict) else {}


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
