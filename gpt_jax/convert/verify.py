"""Whether transformers computes what we compute, from the same folder.  Needs torch."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.convert.open_model import OpenModel

LENGTH = 128
# Of outputs up to 1; that of an f32 product of a whole network is about a hundredth of it.
_TOLERANCE = 1e-3
_NEEDED = ("torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two models' outputs are from each other.

    Attributes:
      tokens: How many were read.
      largest: The largest absolute difference.
      scale: The largest absolute output.
    """

    tokens: int
    largest: float
    scale: float

    @property
    def holds(self) -> bool:
        return self.largest <= _TOLERANCE * max(1.0, self.scale)

    def __str__(self) -> str:
        words = "agrees" if self.holds else "does NOT agree"
        return (
            f"transformers {words}: outputs of {self.tokens} tokens differ by at most "
            f"{self.largest:.2g}, the largest is {self.scale:.3g}"
        )


def need_transformers() -> None:
    """Raises ValueError where transformers or torch is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--verify: compares with transformers, but {' and '.join(missing)} is not installed; "
            "install the extra 'peers', or leave --verify out"
        )


def compare(opened: OpenModel, folder: Path) -> Agreement:
    """Our outputs of random tokens beside those of transformers, both in float32.

    Args:
      opened: Ours.
      folder: A folder of Hugging Face's with the same model.
    """
    config, rng = opened.model.config, np.random.default_rng(0)
    length = min(LENGTH, config.seq_len)
    # No special tokens: padding would be left out, and is not by us.
    names = {opened.tokenizer.token_id(token) for token in opened.tokenizer.special_tokens}
    known = min(config.vocab_size, opened.tokenizer.vocab_size)
    ids = np.array([i for i in range(known) if i not in names], np.int32)
    tokens_BT = rng.choice(ids, (1, length))
    inputs = {"decoder_tokens" if config.family == "encoder_decoder" else "tokens": tokens_BT}
    if config.family == "encoder_decoder":
        inputs["tokens"] = rng.choice(ids, (1, length))
    ours, theirs = _ours(opened, inputs), _theirs(folder, inputs, config.head)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return Agreement(length, float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))


def _ours(opened: OpenModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    model = opened.model.clone(
        config=dataclasses.replace(opened.model.config, dtype="float32", dropout=0.0)
    )
    tokens_BT, source = inputs["tokens"], {}
    if "decoder_tokens" in inputs:
        tokens_BT, source = inputs["decoder_tokens"], {"encoder_tokens": jnp.asarray(tokens_BT)}
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.apply({"params": opened.params}, jnp.asarray(tokens_BT), **source))


def _theirs(folder: Path, inputs: dict[str, np.ndarray], head: str) -> np.ndarray:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model_class: Any = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(folder, local_files_only=True).float().eval()
    tensors = {"input_ids": torch.from_numpy(inputs["tokens"].astype(np.int64))}
    if "decoder_tokens" in inputs:
        decoder = inputs["decoder_tokens"].astype(np.int64)
        tensors["decoder_input_ids"] = torch.from_numpy(decoder)
    with torch.inference_mode():
        found = model(**tensors, return_dict=True)
    if head == "none":
        return found.last_hidden_state.numpy()
    if head == "span":
        return torch.stack([found.start_logits, found.end_logits], dim=-1).numpy()
    return found.logits.numpy()
