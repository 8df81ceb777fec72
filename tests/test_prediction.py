"""Predictions: made from a ledger, written once, kept in the receipt, scored."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import ROOT

from gpt_jax.cli.main import main
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.identity import config_sha
from gpt_jax.runs.ledger import write_ledger
from gpt_jax.scaling import counts, fitted
from gpt_jax.scaling.laws import ParamDataLaw
from gpt_jax.scaling.predicting import make_prediction, target_of
from gpt_jax.scaling.prediction import (
    FILE,
    SHA_KEY,
    check_prediction,
    kept_prediction,
    read_prediction,
    score,
    write_prediction,
)
from gpt_jax.train.loop import fit
from gpt_jax.train.setup import set_up

SPEC = str(ROOT / "configs" / "gpt.py:size=100k,debug")
LAW = ParamDataLaw(E=1.2, A=30.0, B=200.0, alpha=0.35, beta=0.4)
LINES = "python_lines/next_line_logprob"


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    few = {name: dataclasses.replace(law, draws=60) for name, law in fitted.LAWS.items()}
    monkeypatch.setattr(fitted, "LAWS", few)


def config_of(*changes, **more):
    values = load_config(SPEC, ["optimizer.name=adamw", *changes])[0]
    return run_config({**values, **more})


def rows_of(noise=0.01, **more):
    """A ladder of 5 budgets by 5 sizes that follows LAW, and a measure that follows L(C)."""
    rng, rows = np.random.default_rng(0), []
    for flops in (1e9, 3e9, 1e10, 3e10, 1e11):
        best = float(LAW.optimum(flops)[0])
        for factor in (0.4, 0.65, 1, 1.6, 2.5):
            size = best * factor
            tokens = flops / 6 / size
            loss = float(LAW.predict(size, tokens) * np.exp(noise * rng.standard_normal()))
            row = {"name": f"c{flops:g}-{factor}", "status": "finished", "data": "texts"}
            row |= {"num_params": size, "num_params_non_embedding": size / 2, "flops": flops}
            row |= {"num_tokens": tokens, "loss": loss, "prediction_sha256": None}
            share = float(np.exp(-40 * flops**-0.1))
            row["evaluations"] = {LINES: -300 * flops**-0.1, "share": share}
            rows.append({**row, **more})
    return rows


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, rows_of())
    return path


def test_a_prediction_holds_what_it_was_made_of(ledger, tmp_path):
    rows = [*rows_of(), *({**rows_of()[0], "name": x} for x in ("wild", "short", "seen", "own"))]
    config = config_of()
    rows[-4] |= {"status": "diverged"}
    rows[-3] |= {"status": "unfinished"}
    rows[-2] |= {"prediction_sha256": "f00"}
    rows[-1] |= {"config_sha": config_sha(config)}
    write_ledger(ledger, rows)
    made = make_prediction(config, ledger)
    target = target_of(config)
    assert made["run"] == dataclasses.asdict(target)
    assert target.num_params == counts.num_parameters(config.model)
    assert target.num_tokens == 20 * 8 * 32
    assert made["config"] == config.to_dict() and made["config_sha"] == config_sha(config)
    assert {row["name"]: row["reason"] for row in made["excluded"]} == {
        "wild": "diverged", "short": "not finished (unfinished)", "seen": "was predicted",
        "own": "is this run",
    }  # fmt: skip
    assert made["made_after_the_run"]  # the ledger has it
    assert len(made["used"]) == 25 and made["used"][0]["name"] == "c1e+09-0.4"
    by_both, by_compute = made["predictions"]
    assert by_both["form"].startswith("L(N, D)") and by_compute["form"].startswith("L(C)")
    # Far from the ladder's sizes, but L(N, D) is what the runs follow.
    truth = float(LAW.predict(target.num_params, target.num_tokens))
    assert by_both["low"] < truth < by_both["high"]
    assert by_both["value"] == pytest.approx(truth, rel=0.1)
    for one in made["predictions"]:
        assert one["low"] < one["value"] < one["high"]
    write_ledger(ledger, rows[:-1])
    assert not make_prediction(config, ledger)["made_after_the_run"]


def test_measures_are_predicted_in_gpt4s_form(ledger):
    made = make_prediction(config_of(), ledger, measures=[LINES, "share"])
    flops = made["run"]["flops"]
    lines, share = made["predictions"][2:]
    assert lines["value"] == pytest.approx(-300 * flops**-0.1, rel=1e-6)
    assert share["value"] == pytest.approx(np.exp(-40 * flops**-0.1), rel=1e-6)
    assert lines["low"] <= lines["value"] <= lines["high"] < 0
    with pytest.raises(ValueError, match=r"^measures: 'x' is no evaluation .* they have python_l"):
        make_prediction(config_of(), ledger, measures=["x"])


def test_what_is_missing_is_told(ledger):
    rows = rows_of()
    write_ledger(ledger, [row for row in rows if row["name"].startswith(("c1e+09", "c3e+09"))])
    made = make_prediction(config_of(), ledger)  # two budgets: no L(C)
    assert [one["law"] for one in made["predictions"]] == ["param_data"]
    assert "missing 1 more (2 of at least 3)" in made["refused"][0]["reason"]
    write_ledger(ledger, rows[:2])
    with pytest.raises(ValueError, match=r"^ledger: too few runs .* missing 4 more runs \(2 of"):
        make_prediction(config_of(), ledger)
    write_ledger(ledger, [*rows, *({**row, "name": row["name"] + "x", "data": "other"}
                                   for row in rows)])  # fmt: skip
    with pytest.raises(ValueError, match=r"^ledger: its runs are of different data: other; texts"):
        make_prediction(config_of(), ledger)
    with pytest.raises(ValueError, match=r"^train.duration: '2 epochs' is a length that only the"):
        target_of(config_of("train.duration=2 epochs"))


def test_a_prediction_is_written_once_and_is_of_one_config(ledger, tmp_path):
    config, folder = config_of(), tmp_path / "run"
    assert check_prediction(folder, config) is None
    sha = write_prediction(folder, make_prediction(config, ledger))
    content = (folder / FILE).read_bytes()
    with pytest.raises(ValueError, match=r"^--workdir: .* a prediction is never replaced"):
        write_prediction(folder, {})
    assert (folder / FILE).read_bytes() == content
    assert check_prediction(folder, config) == sha == read_prediction(folder)[1]
    # As JSON gives it, and what only watches the run.
    kept = run_config(json.loads(json.dumps(config.to_dict())))
    assert check_prediction(folder, kept) == sha
    assert check_prediction(folder, config_of("train.log_every=7")) == sha
    told = r"^optimizer.learning_rate: 0.5 in the config, but prediction.json .* with 0.0"
    with pytest.raises(ValueError, match=told):
        check_prediction(folder, config_of("optimizer.learning_rate=0.5", "train.duration=3"))
    (folder / FILE).write_text("{}")
    with pytest.raises(ValueError, match="is damaged: it is no prediction"):
        check_prediction(folder, config)


@pytest.fixture
def quiet(corpus):
    """Changes that make a run of the corpus write little."""
    return [
        f"data.path={corpus}", "train.tensorboard=False", "train.sample_prompts=()",
        "train.checkpoint_every=10 steps", "data.tokenizer=bytes",
    ]  # fmt: skip


def test_a_run_keeps_the_prediction_it_began_with(ledger, tmp_path, cache_dir, quiet, recwarn):
    config, folder = config_of(*quiet), tmp_path / "run"
    sha = write_prediction(folder, make_prediction(config, ledger))
    other = config_of(*quiet, "seed=3")
    with pytest.raises(ValueError, match=r"^seed: 3 in the config, but prediction.json"):
        set_up(other, folder, cache_dir)
    assert [path.name for path in folder.iterdir()] == [FILE]  # nothing was written
    receipt = folder / "receipt.json"
    assert fit(set_up(config, folder, cache_dir)) == 0
    assert json.loads(receipt.read_text())[SHA_KEY] == sha
    judged = score(folder)
    assert judged.objections == () and judged.sha256 == sha
    first = judged.comparisons[0]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert first.actual == rows[-1]["eval/validation/loss"]
    assert first.error == pytest.approx(first.predicted / first.actual - 1)
    assert first.is_inside == (first.low <= first.actual <= first.high)
    assert not [w for w in recwarn if FILE in str(w.message)]

    # Another file later: told when the run goes on, and by the score; the receipt keeps its own.
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text + " ")
    with pytest.warns(UserWarning, match=f"but the run began with {sha}"):
        training = set_up(config, folder, cache_dir)
    training.lock.close()
    assert json.loads(receipt.read_text())[SHA_KEY] == sha
    assert "but the run began with" in score(folder).objections[0]
    (folder / FILE).write_text(text)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, duration=21))
    with pytest.warns(UserWarning, match="of a run with train.duration '20 steps', but this one"):
        kept_prediction(folder, longer)
    (folder / FILE).unlink()
    with pytest.warns(UserWarning, match="it is gone; the run began with one of sha256"):
        kept_prediction(folder, config)
    with pytest.raises(ValueError, match=rf"has no {FILE}; the run began with one of sha256 {sha}"):
        score(folder)
    # And one that is made when all is known.
    main_prints(["scaling", "predict", f"--ledger={ledger}", f"--config={SPEC}",
                 "--config.optimizer.name=adamw", *(f"--config.{x}" for x in quiet),
                 f"--workdir={folder}"])  # fmt: skip
    made = read_prediction(folder)[0]
    assert made["made_after_the_run"] and made["config_sha"] == config_sha(config)
    assert score(folder).objections[0] == "it was made after the run had begun"


def main_prints(argv, code=0):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == code


def test_the_commands(ledger, tmp_path, capsys, quiet):
    main_prints(["scaling", "fit", f"--ledger={ledger}", f"--out={tmp_path / 'laws.json'}"])
    out = capsys.readouterr().out
    assert "25 runs, N is num_params" in out and "L(N, D) = E" in out and "best N ~ C^0.5" in out
    laws = json.loads((tmp_path / "laws.json").read_text())["laws"]
    low, high = laws[0]["intervals"]["alpha"]
    assert low < LAW.alpha < high
    folder = tmp_path / "run"
    predict = ["scaling", "predict", f"--ledger={ledger}", f"--config={SPEC}",
               f"--workdir={folder}", f"--measures={LINES}"]  # fmt: skip
    main_prints(predict)
    out = capsys.readouterr().out
    assert read_prediction(folder)[1] in out and f"{LINES}: -" in out
    for argv, told in (
        (predict, "error: --workdir: "),
        (
            [*predict, f"--workdir={tmp_path / 'other'}", "--params=x"],
            "error: --params: 'x' is not one of num_params, ",
        ),
        (["scaling", "fit", f"--ledger={ledger}", "--law=x"], "error: --law: 'x' is not one of"),
        (["scaling", "score", f"--run={folder}"], "error: --run: "),
        (["scaling", "fit", "--ledger=nowhere"], "error: "),
    ):
        main_prints(argv, code=2)
        assert told in capsys.readouterr().err
