"""Finetuning runs: what they begin with, what they change, and when they end."""

import json
import math
import re
import shutil

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gpt_jax import trees
from gpt_jax.convert.source import inherit_model
from gpt_jax.data.tokenizers import load_tokenizer
from gpt_jax.models.transformer import forward
from gpt_jax.parallel import sharding
from gpt_jax.runs.checkpoint_reader import CheckpointReader
from gpt_jax.runs.config import run_config
from gpt_jax.runs.data import prepare_run
from gpt_jax.runs.metrics import read_rows
from gpt_jax.runs.run import open_run
from gpt_jax.train.loop import FINISHED, fit
from gpt_jax.train.setup import set_up

T = 32
BASE = {
    "seed": 0,
    "model": {"vocab_size": 257, "seq_len": T, "num_layers": 2, "embed_dim": 16, "num_heads": 4},
    "data": {"tokenizer": "bytes", "seq_len": T},
    # No schedule: it goes by the duration, which a run that is continued here changes.
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup": 0},
    "train": {
        "batch_size": 8, "duration": 4, "log_every": 1, "eval_every": 100, "eval_batches": 1,
        "checkpoint_every": 2, "tensorboard": False, "sample_prompts": (),
    },
}  # fmt: skip
SEQUENCE = {"family": "encoder", "head": "sequence", "num_classes": 2, "pool": "mean",
            "num_layers": 1}  # fmt: skip
SEQ2SEQ = {"family": "encoder_decoder", "positions": "relative", "num_layers": 1}
FROZEN = ("^tokens", "/attention")
# Plain text, so that bytes do.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Nothing is compiled twice."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        compilation_cache.reset_cache()  # it would keep the folder that it began with
        for name, value in values.items():
            jax.config.update(name, value)
        if values is settings:
            yield


def config(**sections):
    """A config of BASE, with what the sections say instead."""
    values = {**BASE, **sections}
    for name, section in sections.items():
        if isinstance(section, dict):
            values[name] = {**BASE.get(name, {}), **section}
    return run_config(values)


def jsonl(folder, rows, validation=None):
    """A folder with a JSONL file a split."""
    folder.mkdir()
    for split, held in (("train", rows), ("validation", validation or rows[:8]), ("test", rows)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    rows = [{"text": f"{i} {'ab'[i % 2] * 4}", "label": "ny"[i % 2]} for i in range(32)]
    return f"classification:{jsonl(tmp_path_factory.mktemp('rows') / 'classes', rows)}"


@pytest.fixture(scope="module")
def translations(tmp_path_factory):
    rows = [{"source": f"{i}", "target": f"{i + 1}"} for i in range(32)]
    return f"translation:{jsonl(tmp_path_factory.mktemp('rows') / 'translations', rows)}"


@pytest.fixture(scope="module")
def start(cache_dir):
    """(config, workdir, devices) -> a Training; what a test leaves open is closed."""
    opened = []

    def set_up_and_remember(config, workdir, devices=1):
        training = set_up(config, workdir, cache_dir, jax.devices()[:devices])
        opened.append(training)
        return training

    yield set_up_and_remember
    for training in opened:
        training.lock.close()
        training.checkpoints.close()


def train(start, config, workdir):
    """Runs to the end; the training as it then is."""
    training = start(config, workdir)
    assert fit(training) == FINISHED
    return training


def rows_with(workdir, name):
    return [row for row in read_rows(workdir / "metrics.jsonl") if name in row]


def losses(workdir):
    return [row["train/loss"] for row in rows_with(workdir, "train/loss")]


def assert_same(ours, theirs, names=None):
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    for name in theirs if names is None else names:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def logits(model, params):
    tokens = np.arange(2 * T, dtype=np.int32).reshape(2, T)
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    return np.asarray(jax.jit(forward, static_argnums=0)(model, params, batch))


@pytest.fixture(scope="module")
def pretrained(start, corpus, tmp_path_factory):
    """The workdir of a language model, checkpoints at the steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    train(start, config(data={"path": str(corpus)}), workdir)
    return workdir


@pytest.fixture(scope="module")
def base(pretrained):
    """That run, read."""
    return open_run(pretrained)


# The beginning.


def test_a_run_begins_with_the_parameters_of_its_source(start, pretrained, base, corpus, tmp_path):
    def first(**init):
        source = {"source": str(pretrained), **init}
        wanted = config(data={"path": str(corpus)}, init=source, seed=7)
        return start(wanted, tmp_path / f"run{len(list(tmp_path.iterdir()))}").params()

    assert_same(first(), base.params)
    # All of it skipped is nothing of it.
    drawn = start(config(data={"path": str(corpus)}, seed=7), tmp_path / "drawn").params()
    assert_same(first(skip=(".",)), drawn)
    assert not np.array_equal(drawn["tokens"], base.params["tokens"])


@pytest.mark.parametrize(
    ("model", "skip", "told"),
    [
        ({"vocab_size": 300}, (), r"model.vocab_size: .*pretrained: .* give 257"),
        ({"embed_dim": 32}, (), r"init.source: .*pretrained: final_norm/scale is \[16\], but"),
        ({**SEQUENCE, "family": "decoder", "pool": "last"}, (),
         r"init.skip: .*pretrained lacks .*classifier/kernel.* no place for its: .*head"),
        ({}, ("^pooler/",), r"init.skip: '\^pooler/' matches no parameter"),
    ],
)  # fmt: skip
def test_a_source_that_does_not_fit_is_refused(
    start, pretrained, corpus, classes, tmp_path, model, skip, told
):
    labels = model.get("head") == "sequence"
    wanted = config(
        model={**BASE["model"], **model}, init={"source": str(pretrained), "skip": skip},
        data={"path": str(corpus)}, tasks={"names": (classes,) if labels else ()},
        objective={"name": "labels" if labels else "causal_lm"},
    )  # fmt: skip
    with pytest.raises(ValueError, match=told):
        start(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_config_does_not_say_is_the_sources(pretrained, base):
    given = {"model": {"dropout": 0.1}, "init": {"source": str(pretrained)}}
    values = inherit_model(given)
    model = json.loads(json.dumps({**base.config.to_dict()["model"], "dropout": 0.1}))
    assert {name: model[name] for name in values["model"]} == values["model"]
    assert {"embed_dim", "vocab_size", "positions"} <= set(values["model"])
    ours = load_tokenizer(values["data"]["tokenizer"], "")
    assert ours.fingerprint == load_tokenizer(pretrained / "tokenizer.json", "").fingerprint


# What is trained.


@pytest.fixture(scope="module")
def adapted(start, pretrained, corpus, tmp_path_factory):
    """A LoRA run of four steps and its first parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    values = inherit_model(lora_values(pretrained, corpus, 4), workdir)
    training = start(run_config(values), workdir)
    before = jax.device_get(training.params())
    assert fit(training) == FINISHED
    return workdir, before


def lora_values(pretrained, corpus, duration):
    """A config that leaves model and tokenizer to its source."""
    return {
        "seed": 0, "optimizer": BASE["optimizer"], "train": {**BASE["train"], "duration": duration},
        "model": {"lora_rank": 2}, "data": {"path": str(corpus), "seq_len": T},
        "init": {"source": str(pretrained)},
    }  # fmt: skip


def is_adapter(name):
    return name.rpartition("/")[2] in ("lora_a", "lora_b")


def saved_names(folder, step):
    manifest = json.loads((folder / str(step) / "manifest" / "metadata").read_text())
    return {name.removeprefix("params/") for name in manifest["leaves"] if "params/" in name}


def test_lora_trains_and_saves_its_adapters_alone(adapted, base):
    workdir, before = adapted
    after = trees.flatten(open_run(workdir).params)
    source, before = trees.flatten(base.params), trees.flatten(before)
    assert {name for name in after if not is_adapter(name)} == set(source)
    for name, array in after.items():
        changed = not np.array_equal(array, before[name])
        assert changed == is_adapter(name), name
        assert is_adapter(name) or np.array_equal(array, source[name]), name
    saved = saved_names(workdir / "checkpoints", 4)
    assert saved and all(map(is_adapter, saved))
    assert not any(map(is_adapter, saved_names(workdir / "base", 0)))


def test_a_run_is_continued_without_its_source(start, adapted, pretrained, corpus, tmp_path):
    source, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(pretrained, source)
    values = inherit_model(lora_values(source, corpus, 2), workdir)
    train(start, run_config(values), workdir)
    shutil.rmtree(source)
    longer = lora_values(source, corpus, 4)
    again = train(start, run_config(inherit_model(longer, workdir)), workdir)
    # It is the run that nothing interrupted.
    assert again.start == 2 and losses(workdir) == losses(adapted[0])
    assert_same(open_run(workdir).params, open_run(adapted[0]).params)
    with pytest.raises(ValueError, match=r"init.source: .* is no run directory"):
        inherit_model(longer, tmp_path / "new")


def test_a_lora_run_is_a_source_like_another(start, adapted, corpus, tmp_path):
    wanted = config(data={"path": str(corpus)}, init={"source": str(adapted[0])})
    training = start(wanted, tmp_path / "run")
    run, merged = open_run(adapted[0]), training.params()
    assert not any(map(is_adapter, trees.flatten(merged)))
    expected = logits(run.model, run.params)
    np.testing.assert_allclose(logits(training.model, merged), expected, atol=1e-5)


# When it ends.


def test_a_run_ends_when_it_becomes_no_better_and_its_best_is_what_is_read(start, tmp_path):
    texts = [{"text": f"{'ab'[i % 2] * 4}", "label": "ny"[i % 2]} for i in range(16)]
    # What is learned is wrong on held-out rows, so they are best predicted at first.
    wrong = [{"text": row["text"], "label": "yn"["ny".index(row["label"])]} for row in texts]
    name = f"classification:{jsonl(tmp_path / 'rows', texts, wrong)}"
    wanted = config(
        model=SEQUENCE, tasks={"names": (name,)}, objective={"name": "labels"},
        optimizer={"freeze": FROZEN},
        train={
            "eval_every": 1, "checkpoint_every": 100, "keep": 1, "keep_best": 1, "patience": 2,
            "metric": f"{name}/loss", "duration": 20,
        },
    )  # fmt: skip
    workdir = tmp_path / "run"
    training = start(wanted, workdir)
    before = trees.flatten(jax.device_get(training.params()))
    assert fit(training) == FINISHED
    for key, array in trees.flatten(training.params()).items():
        frozen = any(re.search(pattern, key) for pattern in FROZEN)
        assert np.array_equal(array, before[key]) == frozen, key

    values = [row[f"eval/{name}/loss"] for row in rows_with(workdir, f"eval/{name}/loss")]
    best, last = 1 + int(np.argmin(values)), len(values)
    assert last == best + 2 < 20
    checkpoints = CheckpointReader(workdir / "checkpoints")
    assert checkpoints.steps() == [best, last]
    checkpoints.close()
    assert open_run(workdir).step == best
    rows = read_rows(workdir / "metrics.jsonl")
    again = train(start, wanted, workdir)
    assert again.start == last and read_rows(workdir / "metrics.jsonl") == rows
    assert f"eval/{name}/accuracy" in rows[-1]


def test_a_metric_of_no_split_is_refused():
    with pytest.raises(ValueError, match=r"train.metric: 'eval/loss' is not measured; .*validat"):
        config(train={"keep_best": 1, "metric": "eval/loss"})


@pytest.mark.slow
def test_a_metric_that_nothing_measures_is_refused(start, classes, tmp_path):
    wanted = config(
        model=SEQUENCE, tasks={"names": (classes,)}, objective={"name": "labels"},
        train={"keep_best": 1, "metric": f"{classes}/f1", "duration": 2, "eval_every": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"train.metric: .*f1' is not measured; there is .*/acc"):
        fit(start(wanted, tmp_path / "run"))


# Teachers.


def test_dpo_begins_at_ln_2_and_learns_its_pairs(start, pretrained, base, tmp_path):
    rows = [{"prompt": f"{i}", "chosen": " yes", "rejected": " no"} for i in range(16)]
    tasks = {"names": (f"preference:{jsonl(tmp_path / 'rows', rows)}",)}
    sections = {"tasks": tasks, "objective": {"name": "dpo"}, "model": {"seq_len": T}}
    source, workdir = {"source": str(pretrained)}, tmp_path / "run"
    training = start(config(**sections, init=source, train={"duration": 8}), workdir)
    reference = jax.device_get(training.fixed.teacher)
    assert fit(training) == FINISHED
    found = rows_with(workdir, "train/loss")
    assert found[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1]["train/accuracy"] >= 0.9 and found[-1]["train/loss"] < 0.5
    assert_same(training.fixed.teacher, reference)
    assert_same(reference, base.params)
    # Step 2 of the source is another reference.
    longer = config(**sections, init={**source, "step": 2}, train={"duration": 9})
    with pytest.raises(ValueError, match=r"objective.teacher: \(or init.source, .* other param"):
        start(longer, workdir)


def test_a_student_learns_from_a_teacher_that_stays(start, pretrained, base, corpus, tmp_path):
    wanted = config(
        model={"num_layers": 1, "embed_dim": 8}, data={"path": str(corpus)},
        objective={"name": "distillation", "teacher": str(pretrained), "teacher_weight": 1.0},
        train={"duration": 6},
    )  # fmt: skip
    training = train(start, wanted, tmp_path / "run")
    found = rows_with(tmp_path / "run", "train/teacher_loss")
    assert found[-1]["train/teacher_loss"] < found[0]["train/teacher_loss"]
    assert_same(training.fixed.teacher, base.params)


# Tasks.


def test_a_mixture_is_judged_by_task(start, classes, translations, tmp_path):
    names = (classes, translations)
    tasks = {"names": names, "max_new_tokens": 2, "eval_examples": 2}
    wanted = config(
        model=SEQ2SEQ, tasks=tasks, objective={"name": "seq2seq"}, train={"duration": 2}
    )
    training = train(start, wanted, tmp_path / "run")
    assert set(training.data.train.parts) == set(names)
    row = rows_with(tmp_path / "run", "eval/tokens")[-1]
    assert {f"eval/{name}/loss" for name in names} <= set(row)
    assert f"eval/{classes}/accuracy" in row and f"eval/{translations}/bleu" in row


def test_two_tasks_of_one_family_are_two(translations, cache_dir, tmp_path):
    other = f"translation:{jsonl(tmp_path / 'rows', [{'source': 'a', 'target': 'b'}] * 8)}"
    wanted = config(
        model=SEQ2SEQ, tasks={"names": (translations, other)}, objective={"name": "seq2seq"}
    )
    data = prepare_run(wanted, cache_dir)
    assert set(data.train.parts) == set(data.validation) == {translations, other}


def two_steps(training):
    """Loss and gradient's norm, [2, 2]: the second step is of updated parameters."""
    size, found = training.config.train.batch_size, []
    for index in range(2):
        rows = sharding.local_rows(size, training.mesh)
        batch = training.data.train.batch(0, size, index, rows)
        batch = sharding.global_batch(batch, rows, size, training.mesh)
        training.state, metrics = training.step(training.state, batch, training.fixed)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(found)


def on_one_device_and_on_a_mesh(start, folder, model, **sections):
    """A Training on one device, and one on a mesh of all axes."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    return (
        start(config(model=model, **sections), folder / "one", 1),
        start(config(model=model, mesh=mesh, **sections), folder / "eight", 8),
    )


@pytest.mark.slow
def test_an_encoder_decoder_is_the_same_on_a_mesh(start, translations, tmp_path):
    sections = {"tasks": {"names": (translations,)}, "objective": {"name": "seq2seq"}}
    one, eight = map(two_steps, on_one_device_and_on_a_mesh(start, tmp_path, SEQ2SEQ, **sections))
    np.testing.assert_allclose(eight[:, 0], one[:, 0], rtol=1e-5)
    assert one[1, 0] < one[0, 0]


def test_an_encoder_is_the_same_on_a_mesh_and_learns_by_its_weights(start, classes, tmp_path):
    weighted = {"name": "labels", "class_weights": (1.0, 3.0), "label_smoothing": 0.1}
    sections = {"tasks": {"names": (classes,)}, "objective": weighted}
    one, eight = on_one_device_and_on_a_mesh(start, tmp_path, SEQUENCE, **sections)
    batch = one.data.train.batch(0, 8, 0)

    def loss(params):
        log_p_BC = jax.nn.log_softmax(forward(one.model, params, batch))
        wanted_BC = 0.9 * jax.nn.one_hot(batch["targets"], 2) + 0.1 / 2
        weights_B = np.array([1.0, 3.0])[batch["targets"]]
        return -((wanted_BC * log_p_BC).sum(1) * weights_B).mean()

    by_hand = float(optax.global_norm(jax.jit(jax.grad(loss))(one.params())))
    one, eight = two_steps(one), two_steps(eight)
    np.testing.assert_allclose(eight[:, 0], one[:, 0], rtol=1e-5)
    np.testing.assert_allclose(eight[:, 1], one[:, 1], rtol=1e-4)
    assert one[0, 1] == pytest.approx(by_hand, rel=1e-4)


# What is refused, with nothing written.


def refused_rows(kind, folder):
    """(config, what is told) of a run whose rows or model do not do."""
    label = [{"text": "x", "label": "n"}, {"text": "y", "label": "y"}]
    if kind == "label":
        name = jsonl(folder, label, [label[0], {"text": "z", "label": "maybe"}])
        wanted = config(
            model=SEQUENCE, tasks={"names": (f"classification:{name}",)},
            objective={"name": "labels"},
        )  # fmt: skip
        return wanted, r"validation.jsonl line 2: label: 'maybe' is not one of n, y"
    if kind == "classes":
        tasks = {"names": (f"classification:{jsonl(folder, label)}",)}
        model = {**SEQUENCE, "num_classes": 3}
        wanted = config(model=model, tasks=tasks, objective={"name": "labels"})
        return wanted, "model.num_classes: 3 is not 2, the classes of task 'classification"
    if kind == "head":
        rows = [{"source": "x", "target": "y"}]
        tasks = {"names": (f"translation:{jsonl(folder, rows)}",)}
        wanted = config(model=SEQUENCE, tasks=tasks, objective={"name": "labels"})
        return wanted, "model.head: 'sequence' does not do task 'translation"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": turns}, {"messages": turns[:1]}]
    template = folder.parent / "chat.jinja"
    template.write_text(TEMPLATE)
    tasks = {"names": (f"chat:{jsonl(folder, rows)}",), "template": str(template)}
    return config(tasks=tasks), r"train.jsonl line 2.*messages\[0\].role: 'user', but the assistant"


@pytest.mark.parametrize("kind", ["label", "classes", "head", "chat"])
def test_bad_rows_are_named_before_anything_is_written(start, tmp_path, kind):
    wanted, told = refused_rows(kind, tmp_path / "rows")
    with pytest.raises(ValueError, match=told):
        start(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_are_read_whole_or_not_in_training_as_in_use(start, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"model.read_prompts_whole: False is not what objective"):
        config(objective={"name": "prefix_lm"})
    wanted = config(model={"read_prompts_whole": True}, data={"path": str(corpus)})
    with pytest.raises(ValueError, match=r"model.read_prompts_whole: True reads prompts in both"):
        start(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()
