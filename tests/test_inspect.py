"""Rows for people: every mark stands where the loss counts, and says what the target is."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT

from gpt_jax.cli.main import main
from gpt_jax.data.chat_template import CHATML_TOKENS
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.reports.inspection import inspect
from gpt_jax.reports.token_lines import Cell, Page, pieces, text_width, wrap
from gpt_jax.runs.config import run_config
from gpt_jax.runs.data import prepare_run

MODEL = {"vocab_size": 300, "seq_len": 256, "num_layers": 1, "embed_dim": 8, "num_heads": 1}
WIDE = Page(width=10_000)
EOS = "<|endoftext|>"
ROWS = {
    "classification": {"text": "fine", "label": "good"},
    "translation": {"source": "a cat", "target": "Käse"},
    # The number of the class is that of the next byte: still a class, and not that byte.
    "tagging": {"words": ["A\x01l", "ran"], "tags": ["B-PER", "O"]},
    "chat": {"messages": [
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."},
    ]},
    "preference": {"prompt": "2+2?", "chosen": "4.", "rejected": "5."},
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, cache_dir):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GPT_JAX_CACHE", str(cache_dir))


@pytest.fixture
def shown(tmp_path, cache_dir):
    """Shows a config's rows: (config, data, lines); `tasks` are families, with rows of ROWS."""

    def show(objective="causal_lm", tasks=(), model=None, page=WIDE, task=None, **data):
        chosen = {k: data.pop(k) for k in ("rows", "index", "part") if k in data}
        for family in tasks:
            folder = tmp_path / family
            folder.mkdir(exist_ok=True)
            rows = ROWS[family] if isinstance(ROWS[family], list) else [ROWS[family]]
            for split in ("train", "validation"):
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / f"{split}.jsonl").write_text(text)
        names = tuple(f"{family}:{tmp_path / family}" for family in tasks)
        config = run_config({
            "seed": 0,
            "model": {**MODEL, **(model or {})},
            "data": {"tokenizer": "bytes", "seq_len": 80, **data},
            "tasks": {"names": names, **(task or {})},
            "objective": {"name": objective},
            "train": {"batch_size": 4, "duration": "1 step"},
        })  # fmt: skip
        prepared = prepare_run(config, cache_dir)
        return config, prepared, list(inspect(config, prepared, cache_dir, page, **chosen))

    return show


def dotted(text):
    """How text of one-byte tokens is shown."""
    return "·".join(text.replace("\n", "⏎"))


def document(lines, name):
    """The line below the header of a document."""
    return lines[next(i for i, line in enumerate(lines) if line.strip().startswith(name)) + 1]


def test_causal_rows_are_marked_from_the_second_token_to_the_target_behind_the_last(shown, corpus):
    config, data, lines = shown(path=str(corpus), rows=2, index=3)
    batch = data.train.batch(config.seed, 4, 3)
    picked = data.train.picks(config.seed, 4, 3)[2]
    assert f"batch 3, row 1 (row {picked[1]} of train, epoch 0)" in lines
    for row in (0, 1):
        title = next(i for i, line in enumerate(lines) if f"row {row} (" in line)
        assert lines[title + 1] == "  80 tokens, no padding"
        assert lines[title + 2].startswith("  each token sees itself and those before it")
        first = batch["segment_ids"][row] == 1
        text = data.tokenizer.decode(batch["tokens"][row][first])
        behind = data.tokenizer.token_text(batch["targets"][row][first][-1]).replace("\n", "⏎")
        marked = f"{dotted(text[:1])}⟦{dotted(text[1:])}·{behind}⟧"
        assert document(lines[title:], "document 1").strip(" ") == marked.strip(" ")
    assert "100.0% of tokens" in "\n".join(lines)


def test_masked_rows_show_each_hidden_token_at_its_place(shown, corpus):
    model = {"family": "encoder", "head": "mlm"}
    config, data, lines = shown(
        "masked_lm", path=str(corpus), model=model, special_tokens=("<mask>",), rows=1
    )
    row = {name: array[0] for name, array in data.train.batch(config.seed, 4, 0).items()}
    text = [data.tokenizer.token_text(i).replace("\n", "⏎") for i in row["tokens"]]
    original = [data.tokenizer.token_text(i).replace("\n", "⏎") for i in row["targets"]]
    line = "".join(
        document(lines, f"document {n}").removeprefix("    ")
        for n in range(1, row["segment_ids"].max() + 1)
    )
    found = re.findall(r"(<mask>|.)⟦→(<mask>|.)⟧", line)
    counted = np.flatnonzero(row["loss_mask"])
    assert len(counted) > 3 and found == [(text[i], original[i]) for i in counted]
    restored = re.sub(r"(<mask>|.)⟦→(.)⟧", r"\2", line).replace("·", "")
    assert restored == "".join(original)
    assert "  all tokens see each other" in [line.split(";")[0] for line in lines]


def test_a_classification_is_an_answer_for_a_language_model_and_a_class_for_an_encoder(shown):
    lines = shown(tasks=("classification",))[2]
    text = dotted("Text: fine\nLabel:")
    assert document(lines, "example 1") == f"    {EOS}·{text}⟦{dotted(' good')}·{EOS}⟧"
    assert "  24 tokens and 56 of padding (70%)" not in lines  # 1 + 17 + 5
    assert "  23 tokens and 57 of padding (71%)" in lines

    model = {"family": "encoder", "head": "sequence", "num_classes": 1}
    lines = shown("labels", tasks=("classification",), model=model)[2]
    assert "  target: good" in lines and not any("⟦" in line for line in lines)
    assert document(lines, "example 1") == f"    {EOS}·{dotted('fine')}·{EOS}"


def test_classes_of_words_stand_behind_their_first_token(shown):
    model = {"family": "encoder", "head": "tokens", "num_classes": 3}
    lines = shown("labels", tasks=("tagging",), model=model)[2]
    assert document(lines, "example 1") == f"    {EOS}·A⟦→B-PER⟧\\x01·l· ⟦→O⟧r·a·n·{EOS}"


def test_a_source_and_its_target(shown):
    model = {"family": "encoder_decoder"}
    lines = shown("seq2seq", tasks=("translation",), model=model, task={"source_len": 40})[2]
    source = document(lines, "example 1")
    assert source.startswith("    source  ") and source.endswith(f"·{EOS}")
    assert dotted("a cat") in source
    target = lines[lines.index(source) + 1]
    # The two bytes of the umlaut are two tokens and one character.
    assert target == f"    target  {EOS}⟦{dotted(' Käse')}·{EOS}⟧"
    assert any("7 tokens and 73 of padding" in line for line in lines)


def test_the_turn_of_the_assistant_and_its_end_are_marked(shown):
    lines = shown(tasks=("chat",), special_tokens=CHATML_TOKENS)[2]
    line = document(lines, "example 1")
    assert line.endswith(f"{dotted('assistant')}·⏎⟦{dotted('Four.')}·<|im_end|>⟧")
    assert line.count("⟦") == 1


def test_pairs_are_called_chosen_and_rejected(shown):
    lines = shown("dpo", tasks=("preference",))[2]
    for name, answer in (("chosen", "4."), ("rejected", "5.")):
        assert document(lines, name) == f"    {EOS}·{dotted('2+2?')}⟦{dotted(answer)}·{EOS}⟧"


def test_ranks_and_positions_stand_beneath_their_tokens(shown, corpus):
    config, data, lines = shown(
        "permutation_lm", path=str(corpus), special_tokens=("<mask>",), rows=1
    )
    row = {name: array[0] for name, array in data.train.batch(config.seed, 4, 0).items()}
    query = row["key_ranks"] == 2**30
    for label, where in (("content", ~query), ("queries", query)):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {label}"))
        tokens, beneath = lines[at], lines[at + 1 : at + 3]
        beneath = {line.split()[0]: line for line in beneath}
        own = row["query_ranks"][where & (row["segment_ids"] == 1)]
        assert beneath["rank"].split()[1:] == [str(rank) for rank in own]
        if label == "queries":
            own = row["positions"][where & (row["segment_ids"] == 1)]
            assert beneath["position"].split()[1:] == [str(position) for position in own]
            masks = [found.start() for found in re.finditer("<mask>", tokens)]
            digits = [found.start() for found in re.finditer(r"\d+", beneath["position"])]
            assert masks == digits
    assert any("none sees a query" in line for line in lines)


def test_a_prefix_is_said_in_words(shown, corpus):
    model = {"read_prompts_whole": True}
    config, data, lines = shown("prefix_lm", path=str(corpus), model=model, rows=1)
    ranks = data.train.batch(config.seed, 4, 0)["key_ranks"][0]
    together = int((ranks == 0).sum())
    assert together > 1 and any(f"the first {together} see each other" in line for line in lines)


def test_parts_of_a_mixture(shown, tmp_path):
    tasks = ("classification", "translation")
    part = f"translation:{tmp_path / 'translation'}"
    lines = shown(tasks=tasks, part=part, rows=6)[2]
    titles = [line for line in lines if line.startswith("batch ")]
    assert len(titles) == 6 and all(f"of {part}, epoch" in title for title in titles)
    assert not titles[-1].startswith("batch 0"), "the next batches follow"
    with pytest.raises(ValueError, match=r"^part: 'sums' is not one of clas"):
        shown(tasks=tasks, part="sums")


def test_what_is_left_out_is_counted(shown, monkeypatch):
    long = {"text": "fine", "label": "x" * 90}
    monkeypatch.setitem(ROWS, "classification", [ROWS["classification"], long])
    lines = shown(tasks=("classification",))[2]
    table = next(line for line in lines if line.startswith("classification")).split()
    assert table[1:4] == ["100.0%", "1", "1"] and table[-1] == "1"


def test_lines_keep_to_the_width_and_colours_change_no_text(shown, corpus):
    special = tuple(f"<extra_id_{i}>" for i in range(10))
    plain, coloured = (
        shown(
            "span_corruption", path=str(corpus), model={"family": "encoder_decoder"},
            special_tokens=special, page=Page(60, colour), rows=1,
        )[2]
        for colour in (False, True)
    )  # fmt: skip
    assert max(len(line) for line in plain if line.startswith("    ")) <= 60
    assert [re.sub(r"\033\[[\d;]*m", "", line) for line in coloured] == plain
    assert not any("\033" in line for line in plain)
    text = "\n".join(coloured)
    assert "\033[31m<extra_id_0>" in text, "what stands for others is red in the source"
    assert "\033[4;32m<extra_id_0>" in text, "and a target in the target"
    page = Page(60, colour=True)
    one_stack = shown(
        "span_corruption", path=str(corpus), model={"read_prompts_whole": True},
        special_tokens=special, page=page, rows=1,
    )[2]  # fmt: skip
    text = "\n".join(one_stack)
    assert "\033[31m<extra_id_0>" in text and "\033[4;32m<extra_id_0>" in text


def test_wide_characters_take_two_columns_and_controls_are_seen():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("价\n\t\x07")
    assert [text for text, *_ in pieces(tokenizer, ids, [0] * 6)] == ["价", "⏎", "⇥", "\\x07"]
    # Tokens of different kinds are never one piece.
    assert pieces(tokenizer, ids[:3], [0, 0, 1])[0] == ("\ufffd", 0, 1)
    assert text_width("价a") == 3
    cells = [Cell((("价", ""),), ("7",)), Cell((("b", ""),), ("12345",))]
    assert wrap(cells, Page(40), ["", "rank"], "") == ["      价·b", "rank  7  12345"]


def run(capsys, *argv):
    with pytest.raises(SystemExit) as done:
        main(list(argv))
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


def test_the_command(capsys, corpus, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    config = ["--config=configs/gpt.py:size=100k,debug", f"--config.data.path={corpus}"]
    overrides = ["--config.data.tokenizer=bytes", "--config.data.seq_len=16"]
    code, out, _ = run(capsys, "data", "inspect", *config, *overrides, "--rows=1", "--index=2")
    assert code == 0 and "batch 2, row 0" in out and "16 tokens" in out and "\033" not in out
    code, _, err = run(capsys, "data", "inspect", *config, *overrides, "--rows=0")
    assert (code, err) == (2, "error: --rows: 0 is not at least 1\n")
    code, _, err = run(capsys, "data", "inspect", *config, *overrides, "--part=x")
    assert (code, err) == (2, "error: part: 'x' is not one of train\n")
    code, _, err = run(capsys, "data", "fetch", "--config.x=1")
    assert code == 2 and "unknown argument --config.x=1" in err
