"""The Python interface beside transformers itself, on tiny random models that it saved."""

import functools
import json

import numpy as np
import pytest

pytestmark = pytest.mark.peers

TEXTS = ("The cat sat on the mat.", "One  two\n\tthree", "naïve 猫 🙂", "a<|endoftext|>b", "")
PROMPTS = ("The cat", "def f(x):\n    return", "One two three four five six")
_SIZES = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.6),
    "llama": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=128, initializer_range=0.5,
    ),
    "t5": dict(
        d_model=32, d_kv=16, num_heads=2, num_layers=2, d_ff=64, decoder_start_token_id=0,
        pad_token_id=0, initializer_factor=3.0, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
}  # fmt: skip
_ADDED = {"gpt2": "$A", "llama": "<|endoftext|> $A", "t5": "$A <|endoftext|>"}
_CLASSES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "t5": ("T5Config", "T5ForConditionalGeneration"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> (our model, theirs, their tokenizer); the last id, 256, ends a text."""

    @functools.cache
    def made(name):
        import tokenizers
        import torch
        import transformers

        import gpt_jax
        from gpt_jax.data.tokenizers import byte_tokenizer

        folder = tmp_path_factory.mktemp(name)
        tokenizer = byte_tokenizer()._tokenizer
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=_ADDED[name], special_tokens=[("<|endoftext|>", 256)]
        )
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|endoftext|>"
        )
        fast.save_pretrained(folder)
        config_class, model_class = (getattr(transformers, each) for each in _CLASSES[name])
        ids = dict(vocab_size=257, eos_token_id=256, bos_token_id=256)
        torch.manual_seed(3)
        theirs = getattr(transformers, model_class.__name__)(
            config_class(**{**ids, **_SIZES[name]})
        ).eval()
        theirs.save_pretrained(folder)
        theirs = model_class.from_pretrained(folder).eval()
        return gpt_jax.from_pretrained(str(folder)), theirs, fast

    return made


def their_rows(theirs, prompts, **options):
    """One prompt at a time: theirs would have to be padded."""
    import torch

    with torch.inference_mode():
        found = [theirs.generate(torch.tensor([ids]), **options).tolist() for ids in prompts]
    return [row for rows in found for row in rows]


def same(ours, theirs, fill):
    """Whether the rows are equal but for what fills them up."""
    width = max(ours.shape[1], max(map(len, theirs)))
    padded = [
        np.pad(np.array(rows), (0, width - len(rows)), constant_values=fill) for rows in theirs
    ]
    ours = np.pad(ours, ((0, 0), (0, width - ours.shape[1])), constant_values=fill)
    np.testing.assert_array_equal(ours, np.stack(padded))
    return True


@pytest.mark.parametrize("name", _SIZES)
def test_encode_and_decode_are_autotokenizer_s(pair, name):
    model, _, tokenizer = pair(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert model.encode(text) == ids
        bare = tokenizer.encode(text, add_special_tokens=False)
        assert model.encode(text, add_special_tokens=False) == bare
        for skip in (False, True):
            assert model.decode(ids, skip_special_tokens=skip) == tokenizer.decode(
                ids, skip_special_tokens=skip
            )
        assert model.decode(ids) == tokenizer.decode(ids)
    rows = [model.encode(text) for text in TEXTS]
    assert model.batch_decode(rows, skip_special_tokens=True) == list(TEXTS[:3]) + ["ab", ""]


@pytest.mark.parametrize("name", _SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 64},
        {},  # 20 new ones
        {"max_length": 60},
        {"max_new_tokens": 24, "repetition_penalty": 1.3},
        {"max_new_tokens": 24, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 16, "min_new_tokens": 10},
        {"max_new_tokens": 24, "num_beams": 4},
        {"max_new_tokens": 24, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"max_new_tokens": 24, "num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3},
        {"max_length": 50, "num_beams": 2, "repetition_penalty": 1.2, "min_length": 45},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "defaults",
)
def test_generate_writes_what_theirs_writes(pair, name, options):
    model, theirs, tokenizer = pair(name)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = their_rows(theirs, prompts, pad_token_id=256, **options)
    ours = model.generate(prompts, pad_token_id=256, **options)
    assert same(ours, expected, 256)
    # A model that writes one thing over and over, or ends at once, would prove little.
    assert len({tuple(row[-6:]) for row in expected}) > 1


def test_texts_and_ids_are_the_same_prompts(pair):
    model, _, _ = pair("llama")
    by_text = model.generate(list(PROMPTS), max_new_tokens=8)
    by_ids = model.generate([model.encode(prompt) for prompt in PROMPTS], max_new_tokens=8)
    np.testing.assert_array_equal(by_text, by_ids)
    np.testing.assert_array_equal(model.generate(PROMPTS[0], max_new_tokens=8)[0], by_ids[0, :16])


def test_a_stop_string_ends_a_text_behind_it(pair):
    model, theirs, tokenizer = pair("gpt2")
    ids = tokenizer.encode(PROMPTS[0])
    (row,) = their_rows(theirs, [ids], max_new_tokens=40, pad_token_id=256)
    text = tokenizer.decode(row[len(ids) :])
    stop = next(text[i : i + 2] for i in range(8, 30) if text[i : i + 2].isascii())
    options = {"max_new_tokens": 40, "stop_strings": [stop], "pad_token_id": 256}
    expected = their_rows(theirs, [ids], tokenizer=tokenizer, **options)
    assert len(expected[0]) < len(row)
    assert same(model.generate(ids, **options), expected, 256)


def test_drafts_write_what_theirs_writes(pair):
    model, theirs, _ = pair("llama")
    prompts = [model.encode(prompt) for prompt in PROMPTS]
    expected = their_rows(theirs, prompts, max_new_tokens=24, pad_token_id=256)
    for how in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        ours = model.generate(prompts, max_new_tokens=24, pad_token_id=256, **how)
        assert same(ours, expected, 256)
    (row,) = their_rows(theirs, prompts[:1], max_new_tokens=24, prompt_lookup_num_tokens=3)
    assert row == expected[0]
    other = pair("gpt2")[0]
    with pytest.raises(ValueError, match="draft: its tokenizer is not the target's"):
        model.generate(prompts, assistant_model=other)


def test_their_streamers_take_our_tokens(pair):
    import transformers

    model, theirs, tokenizer = pair("gpt2")
    ids = model.encode(PROMPTS[1])
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(ids, max_new_tokens=12, streamer=streamer)
    assert same(out, their_rows(theirs, [ids], max_new_tokens=12, pad_token_id=256), 256)
    assert "".join(streamer) == tokenizer.decode(out[0, len(ids) :])


def test_the_files_defaults_hold(pair, tmp_path):
    import shutil

    import gpt_jax

    model, theirs, _ = pair("gpt2")
    folder = tmp_path / "model"
    shutil.copytree(theirs.name_or_path, folder)
    path = folder / "generation_config.json"
    values = json.loads(path.read_text()) | {"num_beams": 3, "max_new_tokens": 9}
    path.write_text(json.dumps(values))
    ids = model.encode(PROMPTS[0])
    by_file = gpt_jax.from_pretrained(str(folder)).generate(ids)
    by_call = model.generate(ids, num_beams=3, max_new_tokens=9)
    np.testing.assert_array_equal(by_file, by_call)


def test_a_sampled_token_has_their_probability(pair):
    import torch

    model, theirs, _ = pair("gpt2")
    ids = model.encode(PROMPTS[0])
    n = 2000
    out = model.generate(
        ids, max_new_tokens=1, do_sample=True, num_return_sequences=n, temperature=1.5, seed=0
    )
    counts_V = np.bincount(out[:, -1], minlength=257)
    with torch.inference_mode():
        logits_V = theirs(torch.tensor([ids])).logits[0, -1].double().numpy() / 1.5
    # Their default leaves the 50 likeliest.
    logits_V[logits_V < np.sort(logits_V)[-50]] = -np.inf
    p_V = np.exp(logits_V - logits_V.max())
    p_V /= p_V.sum()
    assert not counts_V[p_V == 0].any()
    often = p_V * n >= 5
    expected = np.append(p_V[often], p_V[~often].sum()) * n
    observed = np.append(counts_V[often], counts_V[~often].sum())
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    # Five standard deviations of chi-square with so many degrees of freedom.
    freedom = len(expected) - 1
    assert freedom > 3 and chi2 < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_classes_are_the_pipeline_s(classes, tmp_path):
    import torch
    import transformers

    import gpt_jax

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "."]
    words += ["the", "cat", "sat", "on", "mat", "good", "bad", "film", "was"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)
    names = {i: f"class {i}" for i in range(classes)} if classes == 3 else None
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.4,
        **({"id2label": names} if names else {"num_labels": classes}),
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    pipeline = transformers.pipeline("text-classification", model=theirs, tokenizer=tokenizer)
    model = gpt_jax.from_pretrained(str(tmp_path))
    texts = ["the film was good", "the film was bad , the cat sat on the mat .", "unknown words"]
    pairs = [{"text": "the cat", "text_pair": "the good mat"}]
    for inputs, how in (
        (texts[0], {}), (texts, {}), (texts, {"top_k": None}), (texts[0], {"top_k": 2}),
        (pairs, {}), (texts, {"top_k": None, "function_to_apply": "none"}),
    ):  # fmt: skip
        check(model(inputs, **how), pipeline(inputs, **how))


def check(ours, theirs):
    """The same form, names and, but for rounding, numbers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        return
    for one, other in zip(ours, theirs, strict=True):
        check(one, other)


def test_score_is_their_loss(pair):
    import torch

    for name in ("gpt2", "llama"):
        model, theirs, tokenizer = pair(name)
        ids = torch.tensor([tokenizer.encode(TEXTS[0])])
        with torch.inference_mode():
            loss = theirs(ids, labels=ids).loss.item()
        score = model.score(TEXTS[0])
        assert np.log(score.perplexity) == pytest.approx(loss, rel=1e-5)
    model, theirs, tokenizer = pair("t5")
    source, target = (torch.tensor([tokenizer.encode(text)]) for text in TEXTS[:2])
    with torch.inference_mode():
        loss = theirs(source, labels=target).loss.item()
    score = model.score(TEXTS[1], contexts=TEXTS[0])
    assert np.log(score.perplexity) == pytest.approx(loss, rel=1e-5)
