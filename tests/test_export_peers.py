"""What transformers reads from an exported folder: the same model, tokenizer and chat."""

import json

import jax
import make_hf_fixtures as fixture
import numpy as np
import pytest
from test_export import folder_of, llama_run  # noqa: F401  (a fixture)

from gpt_jax.cli.main import main
from gpt_jax.convert import export_run as exporting
from gpt_jax.convert.export_run import export_run
from gpt_jax.convert.import_run import import_run
from gpt_jax.convert.open_model import open_model
from gpt_jax.convert.verify import compare

pytestmark = pytest.mark.peers


def outputs_of(folder, case):
    """What transformers computes with a folder, on the fixture's inputs."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(folder, attn_implementation="eager").float().eval()
    return fixture.hf_outputs(case, model, fixture.inputs(case, 3)), config


@pytest.mark.parametrize("name", fixture.CASES)
def test_transformers_computes_the_same_with_what_we_write(tmp_path, name):
    case = fixture.CASES[name]
    spec, _ = folder_of(tmp_path / "in", name)
    folder, _ = export_run(spec, tmp_path / "out")
    expected, before = outputs_of(tmp_path / "in", case)
    found, after = outputs_of(folder, case)
    assert type(before) is type(after)
    rope = getattr(after, "rope_parameters", None) or {}
    # What is left to a default there is written out here.
    assert (getattr(before, "rope_parameters", None) or {}).items() <= rope.items()
    for output, array in found.items():
        if output == "pooler_output":  # which a bare model of ours does not have
            continue
        np.testing.assert_array_equal(array, expected[output], err_msg=output)


@pytest.mark.parametrize("spelling", ["of version 4", "of version 5"])
@pytest.mark.parametrize("name", ["llama", "llama3", "llama_yarn", "gemma3", "mistral"])
def test_each_spelling_alone_says_all(tmp_path, name, spelling):
    case = fixture.CASES[name]
    spec, _ = folder_of(tmp_path / "in", name)
    folder, values = export_run(spec, tmp_path / "out")
    expected, _ = outputs_of(folder, case)
    new = {"rope_parameters", "dtype"}
    old = {"rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype"}
    leave = new if spelling == "of version 4" else old
    kept = {key: value for key, value in values.items() if key not in leave}
    (folder / "config.json").write_text(json.dumps(kept))
    found, _ = outputs_of(folder, case)
    np.testing.assert_array_equal(found["logits"], expected["logits"])


@pytest.mark.parametrize("name", ["llama", "bert_mlm", "bert_span", "t5_v1_0", "gemma2", "bert"])
def test_outputs_are_compared(tmp_path, name):
    spec, _ = folder_of(tmp_path, name)
    opened = open_model(spec)
    agreement = compare(opened, tmp_path)
    print(agreement)
    assert agreement.holds and agreement.largest < 1e-4
    # A difference that must be told.
    params = jax.tree.map(lambda x: x * 1.01, opened.params)
    wrong = compare(opened.__class__(**{**vars(opened), "params": params}), tmp_path)
    assert not wrong.holds and "does NOT agree" in str(wrong)


def test_the_command_compares_both_ways(tmp_path, capsys):
    spec, _ = folder_of(tmp_path / "in", "llama")
    for arguments in (
        [f"--from={spec}", f"--to={tmp_path / 'run'}"],
        [f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'out'}"],
        [f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'half'}", "--dtype=bfloat16"],
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["convert", *arguments, "--verify"])
        assert exit_info.value.code == 0
        assert "transformers agrees: outputs of 128 tokens" in capsys.readouterr().out


def test_the_tokenizer_and_the_chat(tmp_path, llama_run, monkeypatch):  # noqa: F811
    import dataclasses

    import transformers

    from gpt_jax.data.chat_template import CHATML
    from gpt_jax.data.tokenizers import byte_tokenizer

    run, _ = llama_run
    own = dataclasses.replace(
        open_model(str(run)), prefix_ids=(256,), generation={}, eos_ids=(256,),
        tokenizer=byte_tokenizer(("<|im_start|>", "<|im_end|>")),
        chat_template=dataclasses.replace(CHATML, name="the run's"),
    )  # fmt: skip
    monkeypatch.setattr(exporting, "open_model", lambda *_, **__: own)
    folder, _ = export_run("runs/own", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Zwei Wörter,\n  and more"
    assert theirs(text)["input_ids"] == [256, *own.tokenizer.encode(text)]
    assert set(theirs(text)) == {"input_ids", "attention_mask"}
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (256, 256, 256)
    assert theirs.model_max_length == 512
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    assert rendered == CHATML.render(chat)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [256, 258]


def test_an_encoder_s_tokenizer(tmp_path):
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "##er"]
    spec, _ = folder_of(tmp_path / "in", "bert_sequence", id2label={"0": "a", "1": "b", "2": "c"})
    (tmp_path / "in" / "tokenizer.json").unlink()
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(words))
    with pytest.warns(UserWarning):
        folder, _ = export_run(spec, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = theirs("lower low", "low")
    assert encoded["input_ids"] == [2, 5, 6, 5, 3, 5, 3]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1]
    assert (theirs.pad_token_id, theirs.mask_token_id, theirs.cls_token_id) == (0, 4, 2)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_run_s_generation_is_transformers_s(tmp_path):
    """Greedy text of a run that was imported, exported and read by transformers."""
    import torch
    import transformers

    spec, _ = folder_of(tmp_path / "in", "qwen3")
    import_run(spec, tmp_path / "run")
    folder, _ = export_run(str(tmp_path / "run"), tmp_path / "out")
    ids = torch.tensor([[5, 9, 200, 17]])
    texts = [
        transformers.AutoModelForCausalLM.from_pretrained(where)
        .generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0, eos_token_id=319)
        .tolist()
        for where in (tmp_path / "in", folder)
    ]
    assert texts[0] == texts[1]
