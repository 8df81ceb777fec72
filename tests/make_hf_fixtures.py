"""Writes tests/data/hf_*.npz: what Hugging Face's models compute from weights that a seed makes.

    python tests/make_hf_fixtures.py [NAME ...]

needs the extra `peers`. The tests need only its results: names, shapes, config.json and outputs are
in the files, the weights are made again by `weights`. They hide no mistake: see make_gpt2_fixture.
"""

import dataclasses
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from make_gpt2_fixture import DATA, _normal, checksum

VOCAB, SEED = 320, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One model of Hugging Face's.

    Attributes:
      name: Of the file, after "hf_".
      model: Its class.
      config: Arguments of its config class, which is named in `config_class`.
      lengths: Tokens of each row; the rest is padding.
      decoder_length: Of the decoder's input; 0: none.
      outputs: (name in the output, places kept of it; 0: it has one row a sequence).
    """

    name: str
    model: str
    config_class: str
    config: dict
    lengths: tuple[int, ...]
    decoder_length: int = 0
    outputs: tuple[tuple[str, int], ...] = (("logits", 64),)


_BERT = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=160, max_position_embeddings=96,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB, d_model=64, d_kv=24, num_heads=4, num_layers=2, d_ff=160,
    decoder_start_token_id=0,
)  # fmt: skip
_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=160, max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
)  # fmt: skip
_DECODER = {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
# The window is shorter than the 512 tokens, so that most of them see what lies outside of it
# through the global layers alone.
_WINDOW = 48
_LAYERS4 = dict(num_hidden_layers=4, sliding_window=_WINDOW)
_GEMMA = {**_DECODER, "head_dim": 24, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
_YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128,
)  # fmt: skip


def _decoder(name: str, family: str, config: dict, kind: str = "", **changes) -> Case:
    arguments = (f"{family}ForCausalLM", f"{family}{kind}Config", config | changes, (512,))
    return Case(name, *arguments, outputs=(("logits", 24),))


def _scored(name: str, family: str, config: dict, **changes) -> Case:
    """A head for classes, on the last token of two rows of different length."""
    config = config | {"num_labels": 3, "pad_token_id": VOCAB - 1} | changes
    arguments = (f"{family}ForSequenceClassification", f"{family}Config", config, (96, 61))
    return Case(name, *arguments, outputs=(("logits", 0),))


_DECODER_CASES = (
    _decoder("mistral", "Mistral", _DECODER, sliding_window=_WINDOW),
    _decoder(
        "qwen2", "Qwen2", _DECODER, **_LAYERS4, use_sliding_window=True, max_window_layers=2
    ),
    _decoder("qwen3", "Qwen3", _DECODER, head_dim=24),
    _decoder("smollm3", "SmolLM3", _DECODER, num_hidden_layers=4, pad_token_id=None),
    _decoder("llama3", "Llama", _DECODER, rope_parameters=_LLAMA3),
    _decoder("llama_yarn", "Llama", _DECODER, rope_parameters=_YARN),
    _decoder("gemma", "Gemma", _GEMMA, hidden_act="gelu", head_dim=20, num_key_value_heads=1),
    _decoder(
        "gemma2", "Gemma2", _GEMMA, **_LAYERS4, query_pre_attn_scalar=40,
        attn_logit_softcapping=5.0, final_logit_softcapping=8.0,
    ),
    _decoder(
        "gemma3", "Gemma3", _GEMMA, "Text", **_LAYERS4, query_pre_attn_scalar=40,
        sliding_window_pattern=3, rope_parameters=_GEMMA3_ROPE,
    ),
    _scored("llama_sequence", "Llama", _DECODER),
    _scored("gpt2_sequence", "GPT2", dict(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=96,
    )),
)  # fmt: skip


def _bert(name: str, model: str, outputs, **config) -> Case:
    return Case(name, model, "BertConfig", _BERT | config, (96, 61), outputs=outputs)


def _t5(name: str, **config) -> Case:
    # Beyond 128 tokens lies the last bucket of the relative bias.
    outputs = (("encoder_last_hidden_state", 64), ("logits", 64))
    arguments = ("T5ForConditionalGeneration", "T5Config", _T5 | config)
    return Case(name, *arguments, (288, 150), decoder_length=272, outputs=outputs)


CASES = {
    case.name: case
    for case in (
        _bert("bert", "BertModel", (("last_hidden_state", 64), ("pooler_output", 0))),
        _bert("bert_mlm", "BertForMaskedLM", (("logits", 64),)),
        _bert("bert_sequence", "BertForSequenceClassification", (("logits", 0),), num_labels=3),
        _bert("bert_tokens", "BertForTokenClassification", (("logits", 64),), num_labels=5),
        _bert("bert_span", "BertForQuestionAnswering", (("start_logits", 64), ("end_logits", 64))),
        _t5("t5_v1_0", feed_forward_proj="relu"),
        _t5("t5_v1_1", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        Case("llama", "LlamaForCausalLM", "LlamaConfig", _LLAMA, (512,)),
        *_DECODER_CASES,
    )
}


def weights(case: Case, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """f32 weights; each depends on its name, its shape and the seed alone."""
    made = {}
    norm = 0.0 if case.config_class.startswith("Gemma") else 1.0  # which multiplies by 1 + weight
    for name, shape in shapes.items():
        values = _normal(np.random.PCG64([seed, zlib.crc32(name.encode())]), shape)
        if len(shape) == 1:
            values = 0.3 * values + (norm if "norm" in name.lower() and "bias" not in name else 0.0)
        else:
            # Of a product (out, in), and of an embedding the width that is read.
            values = 2 * shape[1] ** -0.5 * values
            if name.endswith("Attention.q.weight"):
                # T5 does not divide the scores by sqrt(H), so its queries are that much smaller;
                # and with twice as sharp a softmax torch's f32 is 1e-4 from float64 already.
                values *= 0.5 * _T5["d_kv"] ** -0.5
        made[name] = values.astype(np.float32)
    return made


def inputs(case: Case, seed: int) -> dict[str, np.ndarray]:
    """Hugging Face's arguments: int32[B, T] each."""
    rows, longest = len(case.lengths), max(case.lengths)
    mask = (np.arange(longest) < np.array(case.lengths)[:, None]).astype(np.int32)
    made = {"input_ids": _ids(rows, longest, seed + 1), "attention_mask": mask}
    pad = case.config.get("pad_token_id")
    if pad is not None:  # by which transformers finds the last token of a row
        made["input_ids"] = np.where(mask, made["input_ids"] % pad, pad).astype(np.int32)
    if case.config_class == "BertConfig":
        made["token_type_ids"] = (np.arange(longest) >= 40).astype(np.int32) * mask
    if case.decoder_length:
        made["decoder_input_ids"] = _ids(rows, case.decoder_length, seed + 2)
    return made


def _ids(rows: int, length: int, seed: int) -> np.ndarray:
    raw = np.random.PCG64(seed).random_raw((rows, length))
    return (raw % np.uint64(VOCAB)).astype(np.int32)


def places(lengths, count: int) -> np.ndarray:
    """int32[n, 2]: (row, column) of about `count` tokens, none of them padding."""
    every = [(row, column) for row, length in enumerate(lengths) for column in range(length)]
    kept = every[:: max(1, len(every) // count)] + [(row, n - 1) for row, n in enumerate(lengths)]
    return np.array(sorted(set(kept)), np.int32)


def stored(name: str) -> tuple[dict, dict, dict[str, np.ndarray]]:
    """(what the file of a case holds, its config.json, its weights)."""
    with np.load(DATA / f"hf_{name}.npz") as file:
        held = dict(file)
    shapes = {tensor: tuple(shape) for tensor, shape in json.loads(str(held["shapes"])).items()}
    return held, json.loads(str(held["config"])), weights(CASES[name], shapes, int(held["seed"]))


def write_folder(folder, config: dict, arrays: dict[str, np.ndarray]) -> str:
    """Writes config.json and model.safetensors; returns the folder's `init.source`."""
    import safetensors.numpy

    safetensors.numpy.save_file(arrays, Path(folder, "model.safetensors"))
    Path(folder, "config.json").write_text(json.dumps(config))
    return f"hf:{folder}"


def hf_model(case: Case, seed: int):
    """(the torch model, f32, in evaluation mode; {name: shape} of its file; its config.json)."""
    import safetensors
    import torch
    import transformers

    config = getattr(transformers, case.config_class)(**case.config, attn_implementation="eager")
    model = getattr(transformers, case.model)(config).eval()
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made = weights(case, {name: shape for name, shape in state.items() if shape}, seed)
    if case.name == "t5_v1_1":
        # transformers 5 ties every T5 until two different tensors are loaded.
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    made = {name: made[name] for name in model.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safetensors.safe_open(f"{folder}/model.safetensors", framework="numpy") as file:
            saved = {name: state[name] for name in file.keys()}  # noqa: SIM118
        text = Path(folder, "config.json").read_text()
    for name in made.keys() - saved.keys():  # tied: the tensor that is saved
        twin = next(other for other in saved if _tied(model, name, other))
        made[name] = made[twin]
    model.load_state_dict({name: torch.from_numpy(made[name]) for name in made})
    return model, saved, json.loads(text)


def _tied(model, a: str, b: str) -> bool:
    state = model.state_dict()
    return state[a].data_ptr() == state[b].data_ptr()


def hf_outputs(case: Case, model, arguments) -> dict[str, np.ndarray]:
    """The outputs that the case keeps, whole, in the model's dtype."""
    import torch

    tensors = {name: torch.from_numpy(ids.astype(np.int64)) for name, ids in arguments.items()}
    with torch.inference_mode():
        found = model(**tensors, return_dict=True)
    return {name: found[name].numpy() for name, _ in case.outputs}


def kept(case: Case, name: str, array: np.ndarray) -> np.ndarray:
    """The part of an output that is stored: rows of the places, or all of it."""
    count = dict(case.outputs)[name]
    if not count:
        return array
    decodes = case.decoder_length and name == "logits"
    lengths = [case.decoder_length] * len(case.lengths) if decodes else case.lengths
    row, column = places(lengths, count).T
    return array[row, column]


def main() -> None:
    seed = SEED
    for case in [CASES[name] for name in sys.argv[1:] or CASES]:
        model, shapes, config = hf_model(case, seed)
        outputs = hf_outputs(case, model.double(), inputs(case, seed))
        path = DATA / f"hf_{case.name}.npz"
        np.savez_compressed(
            path,
            seed=seed,
            config=json.dumps(config),
            shapes=json.dumps(shapes),
            checksum=checksum(weights(case, shapes, seed)),
            **{name: kept(case, name, out).astype(np.float32) for name, out in outputs.items()},
        )
        sizes = {name: f"{np.abs(out).max():.3g}" for name, out in outputs.items()}
        print(f"{path}: {path.stat().st_size} bytes, largest {sizes}")


if __name__ == "__main__":
    main()
