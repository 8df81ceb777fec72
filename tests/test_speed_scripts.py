"""The scripts of experiments/speed: their arguments, and the arithmetic of their tables."""

import subprocess
import sys

import pytest
from conftest import ROOT

from gpt_jax.models.config import TransformerConfig
from gpt_jax.scaling.counts import flops_per_token

FOLDER = ROOT / "experiments" / "speed"
SCRIPTS = ("train_step", "growth", "input_path", "start", "memory", "checkpoint")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The folder is importable, as it is for its scripts, and its names are gone afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}
    yield
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_mistakes(name):
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert f"python experiments/speed/{name}.py" in helped.stdout
    assert "--debug" in helped.stdout
    wrong = subprocess.run([*command, "--rounds=0"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "0 is below 1" in wrong.stderr


def test_flops_are_those_of_the_model():
    import train_libraries

    shape = train_libraries.SHAPES["char"]
    config = TransformerConfig(
        vocab_size=shape.V, seq_len=shape.T, num_layers=shape.L, embed_dim=shape.D,
        num_heads=shape.N, positions="learned", norm="layernorm", activation="gelu", tied=True,
        bias=False,
    )  # fmt: skip
    assert shape.flops() == shape.B * shape.T * flops_per_token(config, shape.T)


def test_cases_run_by_turns():
    import measuring

    order = []

    def run(case):
        order.append(case)
        return [float(len(order))]

    assert measuring.alternating("ab", run, 2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert order == list("abab")


def test_fits_find_what_is_there():
    import growth

    lengths = growth.SWEEPS["length"][1]
    found = growth.line(lengths, [40.0 + 0.5 * t for t in lengths])
    assert found == {
        "a": pytest.approx(40), "b": pytest.approx(0.5), "worst": pytest.approx(0, abs=1e-9),
    }  # fmt: skip
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    rows = [{"value": 0, "flops": f, "tokens": 2, "ns_token": n} for f, n in
            ((1, 100), (8, 8), (64, 64))]  # fmt: skip
    assert growth.fit("width", rows)["exponent"] == pytest.approx(1)  # the smallest is left out


def test_sweeps_change_one_number():
    import growth

    for letter, values in growth.SWEEPS.values():
        for value, shape in zip(values, growth.sweep(letter, values), strict=True):
            assert getattr(shape, letter) == value
            assert shape.D == 64 * shape.N
            if letter != "B":
                assert shape.B * shape.T == growth.BASE.B * growth.BASE.T


def test_import_times_are_summed_by_package():
    import start

    log = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       300 |        300 |   jax.core\n"
        "import time:       200 |        500 | jax\n"
        "import time:       900 |       1400 | numpy\n"
        "step 1/2  loss 6.2\n"
    )
    seconds = start.by_package(log)
    assert list(seconds) == ["numpy", "jax"]
    assert seconds["jax"] == pytest.approx(0.0005)
