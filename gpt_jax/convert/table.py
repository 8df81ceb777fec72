"""What a table of a family is made of, and the one reader of all tables.  Starts no JAX.

A table says of each tensor of a file which of our parameters it is and how it lies there. Read from
left to right it imports (`read_params`), from right to left it exports (convert.export_run).
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.tensors import Renamed, Tensors
from gpt_jax.models.config import TransformerConfig

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

    def to_theirs(self, parts: Sequence[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
        """The tensor of the shape `their_shape` whose part k is parts[k]: undoes `to_ours`."""
        assert len(parts) == self.part[1], (len(parts), self.part)
        inputs, outputs = self._shape(self.inputs, sizes), self._shape(self.outputs, sizes)
        sides = [math.prod(side) for side in (inputs, outputs) if side]
        theirs = np.concatenate([part.reshape(sides) for part in parts], axis=-1)
        if self.transposed:
            theirs = theirs.T
        if self.interleaved:
            heads, head_dim = outputs
            halves = theirs.reshape(heads, 2, head_dim // 2, -1)
            theirs = halves.swapaxes(1, 2).reshape(theirs.shape)
        return theirs

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of ours, of one layer."""
        return self._shape((*self.inputs, *self.outputs), sizes)

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
    """How one family of models is imported and exported.

    Attributes:
      values: config.json -> fields of TransformerConfig, all but `tied`.
      to_config: The way back: TransformerConfig -> config.json, `architectures` and `model_type`
        with it, but without `tie_word_embeddings`. What the family does not have, such as an
        activation, may become anything that it has: convert.export_config compares what `values`
        makes of it. None: the family is not exported.
      table: Their tensors and ours.
      prefix: What some files put before most names; what is exported has it before all names but
        those of heads.
      renamed: (pattern, replacement) for spellings of older files.
      ignored: Patterns (re.fullmatch) of buffers and of what no model of ours has.
      copies: Name -> name of the tensor that it may repeat; an exact copy is left out.
      head: The untied head, if any.
      heads: Names (re.match) that never have the prefix.
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
    to_config: Callable[[TransformerConfig], dict[str, Any]] | None = None
    heads: str = r"(lm_head|score|cls|classifier|qa_outputs)\."


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


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters, float32, which is read only when it is asked for.

    Attributes:
      names: Their tensors that it is made of: one a layer if it is stacked, else one.
      rule: How it lies in each.
      sizes: Of the model.
      tensors: Where they are read.
      stacked: Whether the layers are a first axis.
    """

    names: tuple[str, ...]
    rule: Rule
    sizes: Mapping[str, Any]
    tensors: Renamed
    stacked: bool
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.rule.our_shape(self.sizes)
        return (len(self.names), *shape) if self.stacked else shape

    def __getitem__(self, i: int) -> "Parameter":
        """That of one layer."""
        assert self.stacked
        return dataclasses.replace(self, names=(self.names[i],), stacked=False)

    def layers(self) -> Iterator[np.ndarray]:
        """The arrays of the layers one by one; a single one if it is not stacked."""
        for name in self.names:
            yield self.rule.to_ours(self.tensors.read(name), self.sizes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, np.float32)
        for i, layer in enumerate(self.layers()):
            array[i if self.stacked else ...] = layer
        return array if dtype is None else array.astype(dtype, copy=False)


def read_params(
    family: Family, values: Mapping[str, Any], tensors: Renamed
) -> dict[str, Parameter]:
    """Our parameters by canonical path: all checked, none read yet.

    Args:
      family: Whose table is read.
      values: From `model_values`.
      tensors: From `named_as_in_table`.

    Raises:
      ValueError: A tensor is missing, unused, of numbers that we cannot read, or of another shape
        than config.json says; the message names the tensors.
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
    return {
        entry.ours: Parameter(
            tuple(entry.their_names(values)), entry.rule, values, tensors, bool(entry.layers)
        )
        for entry in entries
    }


def _is_there(
    entry: Entry, table: tuple[Entry, ...], names: set[str], values: Mapping[str, Any]
) -> bool:
    if not entry.group:
        return True
    group = (other for other in table if other.group == entry.group)
    return any(name in names for other in group for name in other.their_names(values))


def listed(names: Any, most: int = 12) -> str:
    """Names for an error, sorted; a long list is cut."""
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
