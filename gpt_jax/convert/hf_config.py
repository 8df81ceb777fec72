"""A config.json of Hugging Face, in the spellings of transformers 4 and 5.  Starts no JAX."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_jax.convert.json_files import read_json


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """What config.json says, read so that nothing we cannot represent passes silently.

    Attributes:
      values: The file's values.
      where: Named in errors: the file.
    """

    values: Mapping[str, Any]
    where: str

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type", ""))

    @property
    def architecture(self) -> str:
        """The class that wrote the weights; "" where the file does not say."""
        return str((self.values.get("architectures") or [""])[0])

    def get(self, name: str, default: Any = None) -> Any:
        """A value; `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def optional(self, name: str, default: Any) -> Any:
        """A value, None where it is null; `default` where it is absent."""
        return self.values.get(name, default)

    def num_labels(self) -> int:
        """Classes of a head; two are transformers' default, which it does not write."""
        return self.size("num_labels", len(self.get("id2label", {})) or 2)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive number.

        Raises:
          ValueError: It is missing and has no default, or is no positive integer.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"init.source: {self.where}: {name} is {value!r}, not a size")
        return value

    def number(self, name: str, default: float) -> float:
        """A number as float; ValueError for anything else."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"init.source: {self.where}: {name} is {value!r}, not a number")
        return float(value)

    def choice(self, name: str, ours: Mapping[Any, Any], default: Any) -> Any:
        """Our word for theirs, from the table `ours`."""
        value = self.get(name, default)
        if value not in ours:
            known = ", ".join(map(repr, ours))
            raise self.unsupported(name, value, f"only {known}")
        return ours[value]

    def need(self, name: str, *allowed: Any) -> None:
        """Refuses a value that changes what the model computes in a way we do not have.

        An absent or null value passes: what is allowed must be the default.
        """
        if self.values.get(name) is not None and self.values[name] not in allowed:
            raise self.unsupported(name, self.values[name], f"only {allowed[0]!r}")

    def unsupported(self, name: str, value: Any, instead: str) -> ValueError:
        """The error for a value that we cannot represent."""
        return ValueError(
            f"init.source: {self.where}: {name} {value!r} is not supported, {instead}"
        )


def read_hf_config(folder: Path) -> HFConfig:
    """The config.json of a folder.

    Raises:
      ValueError: The folder, or the file in it, is missing or is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"init.source: 'hf:{folder}' is no folder with a config.json; give a folder that "
            "holds config.json and model.safetensors (nothing is downloaded)"
        )
    return HFConfig(read_json(path), str(path))
