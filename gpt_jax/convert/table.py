"""What an import table is made of, and the one reader of all tables.  Starts no JAX.

A table says of each tensor of a file which of our parameters it is and how it lies there. Reading
it from left to right imports; nothing in it prevents reading it from right to left.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.tensors import Renamed, Tensors

# A dim: a field of TransformerConfig, or a number.
Dims = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a tensor of theirs is one of ours.

    Ours has the shape (*inputs, *outputs). Theirs has one dim for all inputs and one for all
    outputs; none for a side that is empty.

    Attributes:
      inputs: Dims that a product contracts, or the rows of an embedding.
      outputs: The others.
      transposed: Theirs has the outputs first, as a torch Linear.
      part: (k, n): theirs holds n such tensors side by side along the outputs; ours is number k.
      interleaved: Theirs is (outputs, inputs), and within a head rows 2 j and 2 j + 1 are our rows
        j and j + H/2: rotary pairs as GGUF stores them.
    """

    inputs: Dims
    outputs: Dims
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    interleaved: bool = False

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of theirs for these sizes of the model."""
        sides = [self._shape(dims, sizes) for dims in (self.inputs, self.outputs)]
        shape = [math.prod(side) for side in sides if side]
        shape[-1] *= self.part[1]
        return tuple(reversed(shape)) if self.transposed else tuple(shape)

    def to_ours(self, theirs: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our parameter from a tensor of the shape `their_shape`."""
        outputs = self._shape(self.outputs, sizes)
        if self.interleaved:
            heads, head_dim = outputs
            pairs = theirs.reshape(heads, head_dim // 2, 2, -1)
            theirs = pairs.swapaxes(1, 2).reshape(theirs.shape)
        if self.transposed:
            theirs = theirs.T
        number, parts = self.part
        theirs = np.split(theirs, parts, axis=-1)[number]
        return theirs.reshape(*self._shape(self.inputs, sizes), *outputs)

    @staticmethod
    def _shape(dims: Dims, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)


def linear(inputs: Dims, outputs: Dims) -> Rule:
    """A torch Linear's weight, (out, in)."""
    return Rule(inputs, outputs, transposed=True)


def vector(*dims: str | int) -> Rule:
    """A bias or a norm's weight."""
    return Rule((), dims)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
      theirs: Their name; {i} is the number of the layer.
      ours: Our canonical path; parameters of layers are stacked along a first axis.
      rule: How theirs lies in ours.
      layers: Field of TransformerConfig that counts the layers; "" outside of them.
      group: Entries of a group are read if the file holds any of them, and then all of them; ""
        is always there.
    """

    theirs: str
    ours: str
    rule: Rule
    layers: str = ""
    group: str = ""

    def their_names(self, sizes: Mapping[str, int]) -> list[str]:
        """Their names, by layer."""
        if not self.layers:
            return [self.theirs]
        return [self.theirs.replace("{i}", str(i)) for i in range(sizes[self.layers])]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of models is imported.

    Attributes:
      values: config.json -> fields of TransformerConfig, all but `tied`.
      table: Their tensors and ours.
      prefix: What some files put before most names.
      renamed: (pattern, replacement) for spellings of older files.
      ignored: Patterns (re.fullmatch) of buffers and of what no model of ours has.
      copies: Name -> name of the tensor that it may repeat; an exact copy is left out.
      head: The untied head, if any.
      tied: Whether it is tied where config.json does not say; None: the file decides.
    """

    values: Callable[[HFConfig], dict[str, Any]]
    table: tuple[Entry, ...]
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head: str = ""
    tied: bool | None = True


def named_as_in_table(family: Family, config: HFConfig, tensors: Tensors) -> Renamed:
    """The tensors by the names of the family's table, without buffers and exact copies."""
    actual: dict[str, str] = {}
    for name in tensors.names():
        ours = name.removeprefix(family.prefix)
        for pattern, replacement in family.renamed:
            ours = re.sub(pattern, replacement, ours)
        if ours in actual:
            raise ValueError(
                f"init.source: {tensors.where}: {actual[ours]} and {name} are both {ours}"
            )
        if not any(re.fullmatch(pattern, ours) for pattern in family.ignored):
            actual[ours] = name
    for copy, of in family.copies.items():
        own_head = copy == family.head and _says_tied(family, config) is False
        if {copy, of} <= set(actual) and not own_head:
            a, b = actual[copy], actual[of]
            if tensors.shape(a) == tensors.shape(b) and (tensors.read(a) == tensors.read(b)).all():
                del actual[copy]
    return Renamed(tensors, actual)


def model_values(family: Family, config: HFConfig, tensors: Renamed) -> dict[str, Any]:
    """Fields of TransformerConfig for a model of the family."""
    says, own_head = _says_tied(family, config), family.head in tensors.names()
    if says and own_head:
        warnings.warn(
            f"{tensors.where}: {family.head} is not the embedding, though config.json ties them; "
            "it is kept as a head of its own",
            stacklevel=2,
        )
    return {**family.values(config), "tied": says is not False and not own_head}


def _says_tied(family: Family, config: HFConfig) -> bool | None:
    return family.tied if family.tied is None else config.get("tie_word_embeddings", family.tied)


def read_params(
    family: Family, values: Mapping[str, Any], tensors: Renamed
) -> dict[str, np.ndarray]:
    """Our parameters, float32, by canonical path.

    Args:
      family: Whose table is read.
      values: From `model_values`.
      tensors: From `named_as_in_table`.

    Raises:
      ValueError: A tensor is missing, unused, or of another shape than config.json says; the
        message names the tensors.
    """
    names = set(tensors.names())
    entries = [entry for entry in family.table if _is_there(entry, family.table, names, values)]
    wanted = {name for entry in entries for name in entry.their_names(values)}
    if wanted != names:
        raise ValueError(
            f"init.source: {tensors.where}: tensors that are missing: {listed(wanted - names)}; "
            f"tensors that have no place: {listed(names - wanted)}"
        )
    for entry in entries:
        expected = entry.rule.their_shape(values)
        for name in entry.their_names(values):
            if tensors.shape(name) != expected:
                raise ValueError(
                    f"init.source: {tensors.where}: {name} is {list(tensors.shape(name))}, but "
                    f"its config makes it {list(expected)}"
                )
    return {entry.ours: _read_entry(entry, values, tensors) for entry in entries}


def _is_there(
    entry: Entry, table: tuple[Entry, ...], names: set[str], values: Mapping[str, Any]
) -> bool:
    if not entry.group:
        return True
    group = (other for other in table if other.group == entry.group)
    return any(name in names for other in group for name in other.their_names(values))


def _read_entry(entry: Entry, values: Mapping[str, Any], tensors: Renamed) -> np.ndarray:
    if not entry.layers:
        return np.ascontiguousarray(entry.rule.to_ours(tensors.read(entry.theirs), values))
    names = entry.their_names(values)
    first = entry.rule.to_ours(tensors.read(names[0]), values)
    stacked = np.empty((len(names), *first.shape), np.float32)
    stacked[0] = first
    for i, name in enumerate(names[1:], 1):
        stacked[i] = entry.rule.to_ours(tensors.read(name), values)
    return stacked


def listed(names: Any, most: int = 12) -> str:
    """Names for an error, sorted; a long list is cut."""
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
