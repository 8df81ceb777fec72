"""GGUF files of the architecture llama: metadata, tensors and tokenizer.  Starts no JAX."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.llama import LLAMA
from gpt_jax.convert.table import Entry

# Hugging Face's names -> GGUF's.
_NAMES = {
    "embed_tokens": "token_embd",
    "layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
    "layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    "layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
_HEAD = "output.weight"
# Where the file holds this tensor, its frequencies are scaled (Llama 3.1).
_ROPE_FACTORS = "rope_freqs.weight"


def _entry(entry: Entry) -> Entry:
    name = f"{_NAMES[entry.theirs.removesuffix('.weight')]}.weight"
    turned = entry.ours.endswith(("attention/q/kernel", "attention/k/kernel"))
    return dataclasses.replace(
        entry, theirs=name, rule=dataclasses.replace(entry.rule, interleaved=turned)
    )


LLAMA_GGUF = dataclasses.replace(
    LLAMA,
    table=tuple(_entry(entry) for entry in LLAMA.table if entry.group != "classifier"),
    prefix="",
    ignored=(),
    copies={_HEAD: "token_embd.weight"},
    head=_HEAD,
)


class GGUF:
    """A GGUF file; its `read` dequantizes.

    Attributes:
      where: The file, named in errors.
    """

    def __init__(self, path: Path):
        from gguf import GGUFReader

        self.where = str(path)
        if not path.is_file():
            raise ValueError(f"init.source: 'gguf:{path}' is no file")
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"init.source: {path} is no GGUF file: {error}") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"init.source: {self.where}: {name} has the quantization "
                f"{tensor.tensor_type.name}, which cannot be read"
            ) from None
        return np.asarray(values, np.float32).reshape(self.shape(name))

    def metadata(self, key: str, default: Any = None) -> Any:
        """A value of the file's metadata; `default` where it is absent."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def hf_config(self) -> HFConfig:
        """The metadata in the words of Hugging Face's config.json.

        Raises:
          ValueError: Another architecture than llama.
        """
        architecture = self.metadata("general.architecture")
        if architecture != "llama":
            raise ValueError(
                f"init.source: {self.where}: general.architecture {architecture!r} is not "
                "supported, only 'llama'"
            )
        heads, width = self._llama("attention.head_count"), self._llama("embedding_length")
        head_dim = self._llama("attention.key_length") or width // heads
        rotated = self._llama("rope.dimension_count") or head_dim
        values = {
            "model_type": "llama",
            "vocab_size": self.shape("token_embd.weight")[0],
            "hidden_size": width,
            "intermediate_size": self._llama("feed_forward_length"),
            "num_hidden_layers": self._llama("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._llama("attention.head_count_kv"),
            "head_dim": head_dim,
            "max_position_embeddings": self._llama("context_length"),
            "rms_norm_eps": _as_written(self._llama("attention.layer_norm_rms_epsilon")),
            "rope_theta": _as_written(self._llama("rope.freq_base")),
            "rope_scaling": self._rope_scaling(),
            "partial_rotary_factor": rotated / head_dim,
            "sliding_window": self._llama("attention.sliding_window"),
            "tie_word_embeddings": _HEAD not in self._tensors,
        }
        return HFConfig(values, self.where)

    def _rope_scaling(self) -> dict[str, Any] | None:
        """In Hugging Face's words."""
        kind = self._llama("rope.scaling.type") or "none"
        if _ROPE_FACTORS in self._tensors:
            kind = "llama3"  # of which the file holds the outcome, not the numbers behind it
        if kind not in ("none", "linear"):
            raise ValueError(
                f"init.source: {self.where}: rope_scaling {kind!r} is not supported in a GGUF "
                "file; open the model's Hugging Face folder"
            )
        factor = _as_written(self._llama("rope.scaling.factor"))
        return None if kind == "none" else {"rope_type": kind, "factor": factor}

    def _llama(self, key: str) -> Any:
        return self.metadata(f"llama.{key}")


def _as_written(value: float | None) -> float | None:
    # 1e-5 is stored in f32; as a float it would read 9.999999747e-06.
    return None if value is None else float(str(np.float32(value)))
