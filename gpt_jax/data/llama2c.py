"""The files of llama2.c (model.bin and tokenizer.bin) as a folder of Hugging Face's.

llama2.c writes 7 int32 (width, width of the MLP, layers, query heads, key/value heads, vocabulary,
longest sequence) and then f32 arrays in a fixed order; its tokenizer.bin is the longest token's
length and then a score, a length and the bytes of every token.
"""

import json
import struct
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers as hf
from tokenizers import decoders, models, normalizers, processors

_UNKNOWN, _BOS, _EOS = "<unk>", "<s>", "</s>"
_SPECIAL = (_UNKNOWN, _BOS, _EOS)
_BYTES = 256  # the tokens behind the special ones
_SPACE = "\u2581"


def write_hf_folder(folder: Path) -> None:
    """Puts config.json, model.safetensors and tokenizer files in the place of `llama2.data`.

    Args:
      folder: Holds llama2.data: model.bin, and right behind it tokenizer.bin.

    Raises:
      ValueError: The file is shorter or longer than its header says.
    """
    source = folder / "llama2.data"
    content = source.read_bytes()
    config, tensors, end = read_model(content)
    tokens = read_tokens(content[end:], config["vocab_size"])
    packed = safetensors.numpy.save(tensors, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(packed)
    tokenizer(tokens).save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": _SPECIAL.index(_BOS), "eos_token_id": _SPECIAL.index(_EOS)}
    # The stories of the training stand one behind another, each after <s>.
    generation = {**ids, "eos_token_id": sorted(ids.values())}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _BOS, "eos_token": _EOS,
        "unk_token": _UNKNOWN, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    files = {"config": {**config, **ids}, "generation_config": generation}
    for name, values in (files | {"tokenizer_config": settings}).items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")
    source.unlink()


def read_model(content: bytes) -> tuple[dict, dict[str, np.ndarray], int]:
    """(config.json, tensors by Hugging Face's names, where the model ends) of a model.bin."""
    if len(content) < 28:
        raise ValueError("data fetch: llama2.data is too short for a model of llama2.c")
    D, F, L, N, K, V, T = struct.unpack("<7i", content[:28])
    tied, V, H = V > 0, abs(V), D // N
    layers = {
        "input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, D),
        "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.down_proj": (D, F),
        "mlp.up_proj": (F, D),
    }  # fmt: skip
    place, tensors = 28, {}

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        start, place = place, place + 4 * int(np.prod(shape))
        if place > len(content):
            raise ValueError("data fetch: llama2.data ends before the model that it begins")
        return np.frombuffer(content[start:place], "<f4").reshape(shape)

    tensors["model.embed_tokens.weight"] = take(V, D)
    for name, shape in layers.items():
        for i, array in enumerate(take(L, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                # Rotary pairs lie side by side; Hugging Face rotates halves.
                array = array.reshape(-1, H // 2, 2, D).swapaxes(1, 2).reshape(shape)
            tensors[f"model.layers.{i}.{name}.weight"] = np.ascontiguousarray(array)
    tensors["model.norm.weight"] = take(D)
    take(2, T, H // 2)  # cosines and sines
    if not tied:
        tensors["lm_head.weight"] = take(V, D)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
        "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": N, "num_key_value_heads": K, "max_position_embeddings": T,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": tied, "dtype": "float32",
    }  # fmt: skip
    return config, tensors, place


def read_tokens(content: bytes, vocab_size: int) -> list[tuple[bytes, float]]:
    """(bytes, score) of every token of a tokenizer.bin."""
    place, tokens = 4, []
    for _ in range(vocab_size):
        if place + 8 > len(content):
            raise ValueError(f"data fetch: llama2.data holds {len(tokens)} of {vocab_size} tokens")
        score, length = struct.unpack("<fi", content[place : place + 8])
        tokens.append((content[place + 8 : place + 8 + length], score))
        place += 8 + length
    return tokens


def tokenizer(tokens: list[tuple[bytes, float]]) -> hf.Tokenizer:
    """SentencePiece's BPE as a tokenizer of Hugging Face's.

    Of two neighbours those are merged first whose union has the highest score; a character that is
    no token becomes its bytes. A text begins with a space that decoding takes away.
    """
    first = len(_SPECIAL) + _BYTES
    texts = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(_BYTES))]
    texts += [piece.decode().replace(" ", _SPACE) for piece, _ in tokens[first:]]
    ids = {text: i for i, text in enumerate(texts)}
    assert len(ids) == len(tokens), "two tokens have one text"
    merges = []
    for i in sorted(range(first, len(texts)), key=lambda i: (-tokens[i][1], i)):
        text = texts[i]
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [(a, b) for a, b in halves if ids.get(a, 0) >= first and ids.get(b, 0) >= first]
    model = models.BPE(ids, merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)
    made = hf.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    made.add_special_tokens([hf.AddedToken(text, normalized=False) for text in _SPECIAL])
    made.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, ids[_BOS])]
    )
    return made
