"""What a person meets: the commands, and one line for every mistake."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import ROOT

from gpt_jax import trees
from gpt_jax.cli.main import main
from gpt_jax.models.transformer import Transformer
from gpt_jax.runs.config import fields, run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.state import abstract_params
from gpt_jax.scaling import counts

CONFIGS = {
    "configs/quickstart.py": ("", "debug"),
    "configs/article.py": ("", "debug"),
    "configs/gpt.py": (
        "", "debug", "size=100k", "size=300k", "size=1m", "size=3m", "size=10m", "size=30m",
        "size=100m", "size=300m", "size=1b", "size=3b", "size=7b",
    ),
    "configs/gpt2.py": ("debug", "size=124m", "size=350m", "size=774m", "size=1.5b"),
    "configs/pretrain_bert.py": ("", "debug", "size=base", "size=large"),
    "configs/pretrain_chinese.py": ("", "debug"),
    "configs/pretrain_gpt.py": (
        "", "debug", "objective=fill_in_the_middle", "objective=permutation_lm",
        "objective=prefix_lm",
    ),
    "configs/pretrain_t5.py": (
        "", "debug", "size=t5-small,version=1.0", "size=t5-base", "size=t5-large",
    ),
    "configs/transformer_mt.py": ("", "debug", "size=base", "size=big"),
}  # fmt: skip
# These begin from another model: tests/test_configs.py builds them with one.
FINETUNE = ("sentiment", "ner", "translation", "code", "multitask")
WITH_A_SOURCE = {f"configs/finetune_{name}.py" for name in FINETUNE} | {
    "configs/sft_chat.py",
    "configs/dpo.py",
}
NO_CONFIGS = {"configs/common.py", "configs/architectures.py"}
DEBUG = "--config=configs/gpt.py:size=100k,debug"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, cache_dir):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GPT_JAX_CACHE", str(cache_dir))


def test_every_shipped_config_is_listed():
    shipped = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert shipped - NO_CONFIGS == set(CONFIGS) | WITH_A_SOURCE


@pytest.mark.parametrize(
    "spec", [f"{file}:{argument}" for file, arguments in CONFIGS.items() for argument in arguments]
)
def test_every_shipped_config_builds(spec):
    config = run_config(load_config(spec)[0])
    params = nn.unbox(abstract_params(Transformer(config.model)))
    assert trees.num_elements(params) == counts.num_parameters(config.model)
    # config.json gives the same run again.
    assert run_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("size", "millions"), [("124m", 124.44), ("350m", 354.82),
                                                ("774m", 774.03), ("1.5b", 1557.61)])  # fmt: skip
def test_gpt2_has_the_published_sizes(size, millions):
    config = run_config(load_config(f"configs/gpt2.py:size={size}")[0])
    assert counts.num_parameters(config.model) / 1e6 == pytest.approx(millions, abs=0.01)


def run(capsys, *argv) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(list(argv))
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


def test_config_prints_values_origins_and_sizes(capsys):
    code, out, _ = run(capsys, "config", "--config=configs/gpt2.py:size=1.5b", "--config.seed=7")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert code == 0
    assert lines["seed"] == ["seed", "7", "command", "line"]
    assert lines["model.embed_dim"] == ["model.embed_dim", "1600", "argument"]
    assert lines["model.positions"] == ["model.positions", "learned", "file"]
    assert lines["optimizer.b1"] == ["optimizer.b1", "0.9", "default"]
    assert lines["total"] == ["total", "1,557,611,200"]
    assert f"{4 * 1557611200:,}" in out and "FLOPs a token" in out
    assert "as if all parameters were trained" not in out
    for some in ("--config.model.lora_rank=4", "--config.optimizer.freeze=tokens"):
        code, out, _ = run(capsys, "config", "--config=configs/gpt2.py", some)
        assert code == 0 and "as if all parameters were trained" in out


def test_train_evaluate_generate(capsys, corpus, tmp_path):
    workdir = tmp_path / "run"
    train = ["train", DEBUG, f"--workdir={workdir}", f"--config.data.path={corpus}"]
    code, out, _ = run(capsys, *train, "--config.train.tensorboard=false")
    assert code == 0
    assert str(workdir) in out and os.environ["GPT_JAX_CACHE"] in out
    assert "loss" in out and "bits/byte" in out
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    code, out, _ = run(capsys, "evaluate", f"--run={workdir}", "--tasks=validation,compression")
    values = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
    assert code == 0
    assert values["validation/loss"] == pytest.approx(last["eval/validation/loss"], abs=1e-3)
    assert 0 < values["compression/zlib_all"] <= values["compression/zlib_each"] < 8

    relative = os.path.relpath(workdir, ROOT)  # as a person would write it
    generate = ["generate", f"--run={relative}", "--prompt=the cat", "--max_tokens=8"]
    code, streamed, _ = run(capsys, *generate, "--seed=3")
    assert code == 0 and streamed.startswith("the cat") and streamed.endswith("\n")
    assert run(capsys, *generate, "--seed=3", "--no-stream")[1] == streamed
    _, several, _ = run(capsys, *generate, "--n=2", "--stop=.")
    assert several.count("--- ") == 2
    code, _, err = run(capsys, "generate", f"--run={workdir}", "--prompt=" + "the cat " * 199)
    assert code == 2 and err.startswith("error: --prompt: ") and "context" in err
    code, _, err = run(capsys, "generate", f"--run={workdir}", "--step=5")
    assert code == 2 and "step: 5 is not among the saved steps" in err
    # Another run's folder is refused, and stays as it was.
    code, _, err = run(capsys, *train, "--config.seed=1")
    assert code == 2 and err.startswith("error: seed: 1 in the config")


MISTAKES = [
    (["--config.model.num_head=3"], "model.num_head: no such key; the nearest is model.num_heads"),
    (["--config.modle.num_heads=3"], "the nearest is model.num_heads"),
    (["--config.model.num_layers=many"], "model.num_layers: 'many' is not of type int"),
    (["--config.model.bias=3"], "model.bias: 3 is not of type bool"),
    (["--config.model.num_heads=3"], "model.num_heads: 3 is not a divisor of embed_dim 32"),
    (["--config.data.seq_len=4096"], "data.seq_len: 4096 is over model.seq_len 128"),
    (["--config.train.batch_size=0"], "train.batch_size: 0 is not at least 1"),
    (["--config.train.duration=soon"], "train.duration: 'soon' is not a duration"),
    (["--config.optimizer.name=sgd"], "optimizer.name: 'sgd' is not one of adamw"),
    (["--config.mesh.data=3"], "mesh: data 3 does not fit the devices: 8 here"),
    (["--config.train.batch_size=4"], "train.batch_size: 4 is not a multiple of 8"),
    (["--config.data.path=/no/such/place"], "data.path: '/no/such/place'"),
    (["--config.data.path=EMPTY"], "holds no file"),
    (["--config.data.path=INVALID"], "on_invalid_utf8"),
    (["--config.data.tokenizer=bytes", "--config.model.vocab_size=100", "--config.data.path=TEXT"],
     "model.vocab_size: 100 is below the tokenizer's 257"),
    (["--config.train.sample_prompts=" + "cat " * 199], "train.sample_prompts: 'cat cat"),
    (["--config.model.attention=cudnn"], "model.attention: 'cudnn' needs a GPU"),
    (["--config.data.eos_token=</s>"], "data.eos_token: '</s>' is for a tokenizer.json"),
    (["--config.data.vocab_size=9999"], "model.vocab_size: 512 is below the tokenizer's 9999"),
    (["--workdir=gs://bucket/run"], "--workdir: 'gs://bucket/run' is not a folder"),
    (["--config.train.wandb=my-project"], "train.wandb: 'my-project' asks for Weights & Biases"),
    (["--config.data.name=lm1b"], "data.name: 'lm1b' has no version"),
    (["--workdir=OTHER"], "holds other files and no run"),
    (["--wrokdir=x"], "unknown argument --wrokdir=x"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "told"), MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(capsys, tmp_path, corpus, argv, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    (tmp_path / "invalid").mkdir()
    (tmp_path / "invalid" / "a.txt").write_bytes(b"good \xff bad" * 20)
    places = {"EMPTY": "empty", "INVALID": "invalid", "OTHER": "other"}
    argv = [word.replace("TEXT", str(corpus)) for word in argv]
    for word, place in places.items():
        argv = [a.replace(word, str(tmp_path / place)) for a in argv]
    if not any("data.path" in word or "data.name" in word for word in argv):
        argv.append(f"--config.data.path={corpus}")
    workdir = [] if any("--workdir" in word for word in argv) else [f"--workdir={tmp_path}/run"]
    code, _, err = run(capsys, "train", DEBUG, *workdir, *argv)
    assert code == 2 and told in err, err
    beside = ("usage", " ", "warning:")
    lines = [line for line in err.strip().splitlines() if not line.startswith(beside)]
    assert len(lines) == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["config", "--config=configs/nothing.py"], "'configs/nothing.py' does not exist"),
        (["config", "--config=configs/gpt.py:size=2m"], "size=2m is not one of 100k"),
        (["config", "--config=configs/gpt.py:colour=red"], "no argument 'colour'"),
        (["config", "--config=configs/gpt.py:debug=1"], "'debug=1' must be written debug"),
        (["config", "--config=README.md"], "'README.md' is not a Python file"),
        (["generate", "--run=nowhere"], "'nowhere' is no run directory"),
        (["generate", "--run=nowhere", "--temperature=-1"], "temperature: -1.0 is not"),
        (["evaluate", "--run=nowhere"], "--run: 'nowhere' holds no run"),
        (["evaluate", "--run=nowhere", "--limit=-1"], "--limit: -1 is not at least 0"),
    ],
)
def test_other_commands_mistakes(capsys, argv, told):
    code, _, err = run(capsys, *argv)
    assert code == 2 and told in err and err.count("\n") == 1


def test_a_bug_of_ours_is_not_dressed_up_as_the_users(monkeypatch):
    import gpt_jax.cli.config as command

    for bug in (lambda *_: json.loads("{"), lambda *_: int("x"), lambda *_: np.ones(3).reshape(2)):
        monkeypatch.setattr(command, "run", bug)
        with pytest.raises(ValueError):
            main(["config", "--config=configs/gpt.py"])


def test_help_at_every_level():
    for argv in ([], ["train"], ["config"], ["generate"], ["evaluate"]):
        words = [sys.executable, "-X", "importtime", "-m", "gpt_jax", *argv, "--help"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "usage: gpt-jax" in done.stdout
        assert "| jax\n" not in done.stderr, "help starts no JAX"


def test_every_field_of_the_config_has_a_type_and_is_refused_another():
    for name in fields():
        values, _ = load_config("configs/gpt.py:debug")
        target = values
        *sections, leaf = name.split(".")
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = {"not": "a value"}
        with pytest.raises(ValueError, match=f"^{name}: "):
            run_config(values)


def test_jax_sees_eight_devices():
    assert jax.device_count() == 8
