"""Reports of several runs: what is read, what is shown, what is refused, and no markup of users."""

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from report_fixtures import (
    ALPHA,
    BETA,
    EVIL,
    A,
    B,
    E,
    add_prediction,
    ladder_rows,
    write_rows,
    write_run,
)

from gpt_jax.cli.main import main
from gpt_jax.reports import figures, page, report, tables
from gpt_jax.reports.curves import loss_curves, thinned
from gpt_jax.reports.report_runs import read_runs
from gpt_jax.scaling import fitted


class Reader(html.parser.HTMLParser):
    """Headings, links to elsewhere, and the texts of table rows."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.links, self.rows, self.headings = [], [], [], []
        self.inside = None
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        self.inside = tag if tag in ("h2", "td", "th") else self.inside

    def handle_endtag(self, tag):
        self.inside = None if tag in ("h2", "td", "th") else self.inside

    def handle_data(self, data):
        if self.inside == "h2":
            self.headings[-1] += data
        elif self.inside:
            self.rows[-1][-1] += data

    def row(self, name, column):
        """The cell of a run's row in the first table that has the column."""
        for i, titles in enumerate(self.rows):
            if column in titles:
                found = [row for row in self.rows[i + 1 :] if row[0] == name]
                return found[0][titles.index(column)]
        raise KeyError(column)


@pytest.fixture(autouse=True)
def few_draws(request, monkeypatch):
    """Intervals of a few fits: quick, and as wide as they happen to be."""
    if "slow" not in request.keywords:
        few = {name: dataclasses.replace(law, draws=10) for name, law in fitted.LAWS.items()}
        monkeypatch.setattr(fitted, "LAWS", few)


@pytest.fixture
def no_library(monkeypatch):
    """Pages without plotly's 5 MB, which parsers would read."""
    monkeypatch.setattr(page, "_plotly_js", lambda: "plotly")


def made(places, title="T"):
    markup, drawn = report.report(read_runs([str(place) for place in places]), title)
    return markup, drawn


def figures_in(markup):
    return json.loads(re.search(r'<script id="figures"[^>]*>(.*?)</script>', markup, re.S)[1])


def test_a_single_run_gives_curves_and_provenance_only(tmp_path, no_library):
    markup, drawn = made([write_run(tmp_path, "alone")])
    read = Reader(markup)
    assert read.headings == ["Config", "Loss curves", "Where the figures come from"]
    assert [figure.key for figure in drawn] == ["loss_by_tokens", "loss_by_flops"]
    assert "picker" not in re.sub(r"<(style|script).*?</\1>", "", markup, flags=re.S)
    assert read.row("devices", "value") == "2 x cpu"
    assert read.row("commit", "value") == ("cd" * 20)[:12] and "cd" * 20 in markup


def test_whether_a_run_was_reproduced_is_told(tmp_path, no_library):
    """By the last verdict of the receipt, whatever start it is kept with."""
    for name, verdicts in (
        ("none", [None]),
        (
            "same",
            [{"equal": False, "steps": 9, "row": "r", "leaf": ""}, {"equal": True, "steps": 9}],
        ),
        (
            "other",
            [{"equal": False, "steps": 9, "row": "step 3, train/loss: 1.0", "leaf": ""}, None],
        ),
    ):
        path = write_run(tmp_path, name) / "receipt.json"
        receipt = json.loads(path.read_text())
        (session,) = receipt["sessions"]
        receipt["sessions"] = [{**session, "reproduced": verdict} for verdict in verdicts]
        path.write_text(json.dumps(receipt))
    shown = {name: Reader(made([tmp_path / name])[0]) for name in ("none", "same", "other")}
    assert not any(row[0] == "run again" for row in shown["none"].rows if row)
    assert shown["same"].row("run again", "value") == "equal, bit for bit, up to step 9"
    assert shown["other"].row("run again", "value") == "different: step 3, train/loss: 1.0"


def test_only_fields_that_differ_are_in_the_table(tmp_path, no_library):
    write_run(tmp_path, "narrow")
    write_run(tmp_path, "wide", embed_dim=64)
    read = Reader(made([tmp_path])[0])
    assert read.headings[:2] == ["What differs between them", "Runs"]
    titles = next(row for row in read.rows if row[0] == "run")
    assert {"model.embed_dim", "model.head_dim", "model.mlp_dim"} == set(titles[1:])
    assert read.row("wide", "model.embed_dim") == "64"
    assert read.row("train.duration", "value") == "400 steps"  # in the fold of common ones


def test_split_tells_missing_from_none():
    common, differing = tables.split({"a": {"x": 1, "y": None}, "b": {"x": 1}})
    assert common == {"x": 1} and differing == ["y"]


def test_curves_by_flops_are_those_by_tokens_scaled(tmp_path):
    runs = read_runs([str(write_run(tmp_path, "r"))])
    by_tokens, by_flops = loss_curves(runs, {"r": "#000000"})
    for one, other in zip(by_tokens.series, by_flops.series, strict=True):
        assert one.y == other.y
        assert [x * 6000.0 * 32 for x in one.x] == pytest.approx(other.x)
    train = by_tokens.series[1]
    assert len(train.x) <= 160 and all(map(math.isfinite, train.y))


def test_thinning_keeps_the_mean_and_the_order():
    curve = tuple((float(x), math.sin(x)) for x in range(1, 1001))
    for is_log in (False, True):
        points = thinned(curve, is_log=is_log, most=50)
        xs = [x for x, _ in points]
        assert len(points) <= 50 and xs == sorted(xs) and xs[0] >= 1 and xs[-1] <= 1000
    even = thinned(curve, is_log=False, most=50)
    assert sum(y for _, y in even) / 50 == pytest.approx(sum(y for _, y in curve) / 1000)
    assert thinned(curve[:7], is_log=True) == list(curve[:7])
    assert thinned(((0.0, 5.0), (1.0, 4.0)), is_log=True) == [(1.0, 4.0)]


def test_names_are_text_wherever_they_stand(tmp_path, no_library):
    rows = ladder_rows()
    rows[5]["overrides"]["train.sample_prompts"] = [EVIL]
    rows[5]["git_commit"] = rows[5]["group"] = EVIL
    markup, _ = made([write_rows(tmp_path / "l.jsonl", rows)], title=f"{EVIL} & {{{{body}}}}")
    assert EVIL not in markup
    read = Reader(markup)
    assert read.tags.count("script") == 3  # figures, library, our own
    assert "<h1>&lt;script&gt;window.hit = 1&lt;/script&gt; &amp; {{body}}</h1>" in markup
    assert read.row(EVIL, "status") == "finished"
    names = {trace["name"] for figure in figures_in(markup) for trace in figure["data"]}
    assert not any("<" in name for name in names)  # plotly would read tags
    metas = {trace.get("meta") for figure in figures_in(markup) for trace in figure["data"]}
    assert EVIL in metas  # by which the list of runs finds it


def test_the_page_asks_nothing_of_a_network(tmp_path):
    markup, _ = made([write_rows(tmp_path / "l.jsonl", ladder_rows())])
    shell = re.sub(r"<script.*?</script>", "", markup, flags=re.S)
    assert not Reader(shell).links and "@import" not in shell and "url(" not in shell
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', shell)[1]
    assert "default-src 'none'" in policy and "connect-src" not in policy
    assert "script-src 'sha256-" in policy and "'unsafe-inline'; img" in policy
    assert "http" not in policy
    # Once, whatever the number of figures.
    assert markup.count("<script>") == 2 and len(markup) > 4e6


def test_what_went_wrong_is_in_the_table_with_the_reason(tmp_path, no_library):
    rows = ladder_rows()
    read = Reader(made([write_rows(tmp_path / "l.jsonl", rows)])[0])
    assert read.row(rows[2]["name"], "status") == "diverged"
    assert read.row(rows[3]["name"], "status") == "unfinished"
    assert read.row(rows[2]["name"], "loss") == "nan"


def numbers(read, row, *columns):
    return [float(read.row(row, column)) for column in columns]


def test_planted_laws_are_found_and_shown(tmp_path, no_library):
    path = write_rows(tmp_path / "l.jsonl", ladder_rows(noise=1e-5))
    markup, drawn = made([path])
    keys = ["loss_by_tokens", "loss_by_flops", "isoflop", "compute_law", "residuals"]
    assert [figure.key for figure in drawn] == keys
    read = Reader(markup)
    assert read.headings[-2:] == ["Laws", "Where the figures come from"]
    for name, true in (("E", E), ("A", A), ("B", B), ("alpha", ALPHA), ("beta", BETA)):
        fitted, low, high = numbers(read, name, "fitted", "90% from", "90% to")
        assert fitted == pytest.approx(true, rel=0.01) and low <= fitted <= high
    # alpha = beta: both grow as the root of the budget.
    assert "grows as C^0.50" in markup
    residuals = next(figure for figure in drawn if figure.key == "residuals")
    away = [y for series in residuals.series for y in series.y]
    assert len(away) == 30 - 2 + 2 and max(map(abs, away)) < 0.01


def test_who_is_not_in_the_fits_is_told_why(tmp_path, no_library):
    rows = ladder_rows()
    rows[-1] |= {"prediction_sha256": "12" * 32, "loss": 9.0}
    markup, drawn = made([write_rows(tmp_path / "l.jsonl", rows)])
    read = Reader(markup)
    assert read.row(rows[0]["name"], "in the fits") == "yes"
    assert read.row(rows[2]["name"], "in the fits") == "no: diverged"
    assert read.row(rows[3]["name"], "in the fits") == "no: not finished (unfinished)"
    assert read.row(rows[-1]["name"], "in the fits") == "no: was predicted"
    residuals = next(figure for figure in drawn if figure.key == "residuals")
    assert rows[-1]["name"] not in {series.run for series in residuals.series}


def test_what_cannot_be_fitted_is_refused_with_what_is_missing(tmp_path, no_library):
    few = write_rows(tmp_path / "few.jsonl", ladder_rows(1, 4))
    markup, drawn = made([few])
    assert "No L(N, D) was fitted: too few runs" in markup and "No L(C) was fitted" in markup
    assert [figure.key for figure in drawn] == ["loss_by_tokens", "loss_by_flops"]
    rows = ladder_rows()
    rows[-1]["data"] = "english"
    markup, _ = made([write_rows(tmp_path / "two.jsonl", rows)])
    assert "of different data: english; python" in markup and "<h2>Laws" not in markup
    pair = write_rows(tmp_path / "pair.jsonl", ladder_rows(1, 2))
    assert "was fitted" not in made([pair])[0]  # nobody would expect it


def test_predictions_stand_beside_what_came(tmp_path, no_library):
    good, after, swapped, open_end = (write_run(tmp_path, name) for name in ("a", "b", "c<i>", "d"))
    sha = add_prediction(good)  # 2.1, and 2.125 came
    add_prediction(after, made_after_the_run=True, sha="")
    add_prediction(swapped, sha="12" * 32)
    add_prediction(open_end)
    (open_end / "checkpoints" / "400").rename(open_end / "checkpoints" / "200")
    markup, drawn = made([tmp_path])
    read = Reader(markup)
    assert "Predictions" in read.headings and drawn[-1].key == "predictions"
    numbers = [read.row("a", title) for title in ("predicted", "from", "to", "actual", "off by")]
    assert numbers == ["2.1000", "2.0500", "2.1500", "2.1250", "-1.18%"]
    assert read.row("a", "interval") == "contains it" and read.row("a", "made") == "before the run"
    by_compute = next(row for row in read.rows if row[0] == "a" and "L(C)" in row)
    assert "misses it" in by_compute
    assert read.row("a", "sha256") == sha[:12] and sha in markup
    assert read.row("b", "made") == read.row("c<i>", "made") == "not before this run"
    assert "The prediction of b: it was made after the run had begun." in markup
    assert f"but the run began with {'12' * 32}" in markup
    assert read.row("d", "predicted") == "2.1000" and read.row("d", "actual") == tables.NOTHING
    crosses = [series.run for series in drawn[-1].series if series.name == "actual"]
    assert crosses == ["a", "b", "c<i>"]
    ticks = figures_in(markup)[-1]["layout"]["xaxis"]["ticktext"]
    assert "c&lt;i&gt;" in ticks  # plotly reads tags


def test_one_name_twice_is_told_apart_by_folder(tmp_path):
    for folder in ("x", "y"):
        write_run(tmp_path / folder, "r")
    assert [run.name for run in read_runs([str(tmp_path)])] == ["x/r", "y/r"]
    # The same run named twice is one.
    twice = read_runs([str(tmp_path / "x"), str(tmp_path / "x" / "r")])
    assert [run.name for run in twice] == ["r"]


def test_a_sweeps_ledger_tells_groups_of_its_runs(tmp_path):
    write_run(tmp_path, "r")
    row = {**ladder_rows()[0], "name": "r", "group": "first", "overrides": {"seed": 3}}
    write_rows(tmp_path / "ledger.jsonl", [row])
    (run,) = read_runs([str(tmp_path)])
    assert run.row["group"] == "first" and run.row["overrides"] == {"seed": 3}
    assert run.row["loss"] == 2.125  # the run's own


@pytest.mark.slow
def test_a_hundred_runs_are_small_and_quick(tmp_path, no_library):
    path = write_rows(tmp_path / "l.jsonl", ladder_rows(10, 10))
    start = time.process_time()  # of this process alone: others may keep the machine busy
    markup, drawn = made([path])
    assert time.process_time() - start < 20
    assert len(markup) < 8e6 and drawn


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_told_by_option(tmp_path, capsys, monkeypatch):
    out = f"--out={tmp_path / 'r.html'}"
    assert "error: --runs: " in refused(capsys, f"--runs={tmp_path / 'nowhere'}", out)
    assert "holds no run" in refused(capsys, f"--runs={tmp_path}", out)
    (tmp_path / "l.jsonl").write_text("{}\n")
    assert "error: --runs: line 1 of" in refused(capsys, f"--runs={tmp_path / 'l.jsonl'}", out)
    (tmp_path / "l.jsonl").write_bytes(b"\xff\xfe")
    assert "error: --runs: " in refused(capsys, f"--runs={tmp_path / 'l.jsonl'}", out)
    assert "error: --runs: " in refused(capsys, "--runs=,", out)
    run = write_run(tmp_path, "r")
    assert "is a folder" in refused(capsys, f"--runs={run}", f"--out={tmp_path}")
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    words = "error: --out: needs plotly; pip install 'gpt-jax[report]'"
    assert words in refused(capsys, f"--runs={run}", out)
    assert not (tmp_path / "r.html").exists()


def test_the_command_writes_page_and_pictures(tmp_path, capsys):
    write_run(tmp_path / "runs", "_a$b")
    write_run(tmp_path / "runs", "b", embed_dim=64)
    out = tmp_path / "new" / "r.html"
    with pytest.raises(SystemExit) as ended:
        main(["report", f"--runs={tmp_path / 'runs'}", f"--out={out}", f"--png={tmp_path / 'png'}"])
    assert not ended.value.code
    written = capsys.readouterr().out.split()
    assert written[0] == str(out) and len(written) == 3
    assert out.read_text().startswith("<!doctype html>") and "Runs of runs" in out.read_text()
    for path in written[1:]:
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in out.parent.iterdir()] == ["r.html"]  # nothing partial


def test_reading_and_drawing_start_no_jax():
    code = "import gpt_jax.reports.report, gpt_jax.cli.report, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_colors_are_distinct_and_valid():
    for count in (1, 2, 8, 9, 30, 100):
        found = figures.colors(count)
        assert len(set(found)) == count
        assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in found)
