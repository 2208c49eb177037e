from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import rankopt
from rankopt._build.compare import Figure
from rankopt._pipeline import stages
from rankopt._report.charts import Line, line_chart, nice_ticks
from rankopt._utils.strict_json import strict_json
from rankopt._utils.tables import table, to_text
from rankopt.cli import main
from rankopt.errors import PlanError, RankoptError
from rankopt.testing import planted_inputs, planted_model
from rankopt.training.state import write_record

VOID = {"meta", "br", "circle", "path"}


class Page(HTMLParser):
    """Text, tags and attributes of a page whose tags are all closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def plan():
    return rankopt.search(planted_model(), "macs<=50%", example_inputs=planted_inputs())


def epochs(count, **more):
    row = {"loss": 1.0, "accuracy": 50.0, "metric": 40.0, "learning_rate": 0.1, "frozen": 2}
    return [
        {**row, "epoch": i, "samples_per_second": 64.0, "seconds": 2.0, **more}
        for i in range(count)
    ]


def record(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    start = {"event": "start", "optimizer": "AdamW", "freezing": "Sequential(parity=0)"}
    lines = [start, *({"event": "epoch", **row} for row in rows)]
    (folder / "record.jsonl").write_text("\n".join(map(json.dumps, lines)))


def drawn(source, tmp_path):
    rankopt.report(source, tmp_path / "page.html")
    return Page(tmp_path / "page.html")


def test_a_plan(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    page = drawn(plan, tmp_path)
    assert page.source == drawn(tmp_path / "plan.json", tmp_path).source
    totals = plan.totals["macs"]
    assert f"{100 * totals['measured'] / totals['before']:.1f}%" in page.text
    assert "knapsack" in page.text
    for decision in plan:
        assert decision.targets[0] in page.words
        assert decision.reason in page.words
    chosen = next(d for d in plan if not d.keeps)
    assert " × ".join(map(str, chosen.ranks)) in page.words
    assert f"{chosen.error:.3f}" in page.words
    assert page.tags.count("tr") >= len(plan.decisions)


def test_words_of_figures_say_what_they_are_shares_of(plan, tmp_path):
    page = drawn(plan, tmp_path)
    assert {"MACs, % of dense", "Parameters, % of dense", "Reason"} <= set(page.words)
    changed, kept = len(plan.changes), len(plan.decisions) - len(plan.changes)
    assert changed > 1
    assert f"{changed} layers decomposed, {kept} kept" in page.text
    model = planted_model()
    found = rankopt.compare(model, model, example_inputs=planted_inputs(), rounds=3)
    words = drawn(found, tmp_path).words
    assert {"Comparison report", "Latency, % of dense", "Output error"} <= set(words)
    value = words[words.index("Latency, % of dense") + 1]
    assert value == f"{100 * found.latency_ratio.median:.1f}%"


def test_bars_share_one_scale(plan, tmp_path):
    page = drawn(plan, tmp_path)
    widths = [
        float(re.fullmatch(r"width:([\d.]+)%", value)[1])
        for name, value in page.attributes
        if name == "style"
    ]
    costs = [d.cost["macs"] for d in plan if d.cost.get("macs", (0, 0))[0]]
    largest = max(max(pair) for pair in costs)
    assert widths == [pytest.approx(100 * c / largest, abs=0.01) for pair in costs for c in pair]


def test_a_page_loads_nothing(plan, tmp_path):
    record(tmp_path / "run", *epochs(3))
    page = drawn([plan, tmp_path / "run"], tmp_path)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}
    assert "url(" not in page.source
    assert "//" not in page.source
    assert "prefers-color-scheme: dark" in page.source


def test_a_second_plan_is_refused(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert drawn([plan, tmp_path / "plan.json"], tmp_path).source == drawn(plan, tmp_path).source
    other = rankopt.search(planted_model(), "params<=30%")
    with pytest.raises(RankoptError, match="two of the sources hold a plan"):
        rankopt.report([plan, other], tmp_path / "page.html")
    model = planted_model()
    compared = [rankopt.compare(model, model, evaluate=lambda m, v=v: v) for v in (1.0, 2.0)]
    with pytest.raises(RankoptError, match="two of the sources hold a comparison"):
        rankopt.report(compared, tmp_path / "page.html")


def test_text_is_no_markup():
    made = table("a [bold]title[/bold]", "note")
    made.add_row("see log [/tmp/run.log], pip install 'rankopt[export]' :smile:")
    text = " ".join(to_text(made).split())
    assert "a [bold]title[/bold]" in text
    assert "see log [/tmp/run.log], pip install 'rankopt[export]' :smile:" in text


def test_names_are_escaped(plan, tmp_path):
    evil = '<script>alert("x")</script>&amp;'
    first, *rest = plan.decisions
    named = replace(first, targets=(evil,), reason=evil)
    model = {**plan.model, "class": evil}
    strategy = {**plan.strategy, "name": evil}
    changed = replace(plan, decisions=(named, *rest), model=model, strategy=strategy)
    record(tmp_path / evil.replace("/", "_"), *epochs(2))
    page = drawn([changed, tmp_path / evil.replace("/", "_")], tmp_path)
    assert "script" not in page.tags
    assert page.words.count(evil) >= 3


def test_a_training_record(tmp_path):
    record(tmp_path / "run", *epochs(2), {**epochs(3)[2], "metric": 61.5, "loss": 0.25})
    page = drawn(str(tmp_path / "run"), tmp_path)
    assert page.source.count("<svg") == 5
    assert "61.5" in page.words  # the best metric
    assert "epoch 3: 0.25, 2 parameters frozen" in page.words
    assert "optimizer AdamW · freezing Sequential(parity=0)" in page.words
    assert page.tags.count("circle") == 5 * 3
    bare = [{**row, "metric": None, "accuracy": None} for row in epochs(1)]
    record(tmp_path / "bare", *bare)
    assert drawn(tmp_path / "bare/record.jsonl", tmp_path).source.count("<svg") == 3


def test_metrics_that_are_not_finite(plan, tmp_path):
    nan = float("nan")
    rows = [{**epochs(3)[i], "metric": m} for i, m in enumerate((nan, 3, 2))]
    write_record(tmp_path, {}, rows)
    assert "NaN" not in (tmp_path / "record.jsonl").read_text()
    record(tmp_path / "older", *rows)
    for folder in (tmp_path, tmp_path / "older"):
        assert "best, epoch 2" in drawn(folder, tmp_path).words
    model = planted_model()
    found = replace(rankopt.compare(model, model), metric=Figure(1.0, nan))
    assert "dense 1" in drawn(found, tmp_path).words
    stored = {"plan": plan.to_dict(), "stages": [], "comparison": found.to_dict()}
    (tmp_path / "result.json").write_text(strict_json(stored))
    assert "dense 1" in drawn(tmp_path / "result.json", tmp_path).words


def test_what_finetune_and_compare_return(tmp_path):
    pytest.importorskip("accelerate")
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    train = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(2)]
    done = rankopt.finetune(small, train, epochs=2, folder=tmp_path / "run")
    page = drawn(done, tmp_path)
    assert f"epoch 2: {done.history[1]['loss']:.5g}" in page.words
    assert f"epoch 2: {done.history[1]['loss']:.5g}" in drawn(tmp_path / "run", tmp_path).words
    compared = rankopt.compare(dense, small, evaluate=lambda model: 7.0 + (model is small))
    page = drawn([small.rankopt_plan, compared], tmp_path)
    assert "dense 7, change +1" in page.words
    assert compared.verdict in page.words
    rankopt.save(small, tmp_path / "small.safetensors")
    stored = drawn(tmp_path / "small.safetensors", tmp_path)
    assert stored.source == drawn(small.rankopt_plan, tmp_path).source


def test_a_compression_finished_or_not(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    dense = planted_model(noise=0.5)
    x = planted_inputs(32)
    train = [(x, dense(x).argmax(dim=1).detach())]
    settings = {
        "train": train, "evaluate": lambda model: 12.5, "rounds": 2, "recover": False,
        "finetune": {"epochs": 1}, "folder": tmp_path / "work",
    }  # fmt: skip

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages.Run, "verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rankopt.compress(dense, "params<=40%", **settings)
    page = drawn(tmp_path / "work", tmp_path)
    assert {"search 1", "finetune 2", "not finished"} <= set(page.words)
    done = rankopt.compress(dense, "params<=40%", **settings)
    page = drawn(tmp_path / "work", tmp_path)
    assert {"verify", "Training 1", "Training 2", "dense 12.5, change +0"} <= set(page.words)
    assert done.comparison.verdict in page.words
    assert "Training 1" not in drawn(done, tmp_path).words
    assert drawn([done, tmp_path / "work"], tmp_path).source == page.source
    (tmp_path / "result.json").write_text(json.dumps(done.to_dict()))  # as printed by --json
    again = drawn(tmp_path / "result.json", tmp_path)
    assert again.source == drawn(done, tmp_path).source


def test_the_command(plan, tmp_path, capsys):
    plan.save(tmp_path / "plan.json")
    record(tmp_path / "run", *epochs(2))
    out = tmp_path / "report.html"
    arguments = ["report", str(tmp_path / "plan.json"), str(tmp_path / "run"), "-o", str(out)]
    assert main(arguments) == 0
    assert f"report written to {out}" in capsys.readouterr().out
    assert {"Layers", "Run"} <= set(Page(out).words)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(out)}
    assert main(["report", str(tmp_path / "none"), "-o", str(out)]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_what_cannot_be_reported(plan, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "record.jsonl").write_text('{"event": "start"}\n{"event": "epoch", "loss": 1}\n')
    for source, error, message in (
        (3, RankoptError, "cannot report a int"),
        ([], RankoptError, "nothing to report"),
        (tmp_path / "none.json", RankoptError, "does not exist"),
        (tmp_path / "empty", RankoptError, "neither record.jsonl nor work.json"),
        (tmp_path / "plan.json", PlanError, "plan schema None"),
        (tmp_path / "notes.txt", RankoptError, "cannot report .*notes.txt"),
        (tmp_path / "record.jsonl", RankoptError, "line 2: KeyError: 'epoch'"),
    ):
        with pytest.raises(error, match=message):
            rankopt.report(source, tmp_path / "page.html")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RankoptError, match="deep.json cannot be read as JSON"):
        rankopt.report(tmp_path / "deep.json", tmp_path / "page.html")
    with pytest.raises(RankoptError, match=r"end it in \.html"):
        rankopt.report(plan, tmp_path / "page.pdf")
    assert not list(tmp_path.glob("page.*"))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 1.0),
        (3.0, 3.0),
        (0.0, 0.0),
        (-2.5, 1e7),
        (1e-9, 3e-9),
        (99.1, 99.2),
        (1e-13, 3e-13),
        (0.6931471805599453, 0.6931471805599454),
        (2.5e7, 9e7),
    ],
)
def test_ticks_cover_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 3 <= len(ticks) <= 7
    steps = {round((b - a) / (ticks[1] - ticks[0]), 3) for a, b in itertools.pairwise(ticks)}
    assert steps == {1}


def test_a_nearly_constant_curve():
    points = [(1, 0.6931471805599453), (2, 0.6931471805599454)]
    assert "<circle" in line_chart("loss", [Line("loss", points, ["a", "b"])], x_label="epoch")


def test_charts_leave_out_what_is_not_finite():
    points = [(1, 0.5), (2, float("nan")), (3, float("inf"))]
    chart = line_chart("loss", [Line("loss", points, ["a", "b", "c"])], x_label="epoch")
    assert chart.count("<circle") == 1
    assert "nan" not in chart
    assert "inf" not in chart
    assert line_chart("loss", [Line("loss", points[1:], ["b", "c"])], x_label="epoch") == ""
    both = [Line(name, [(1, 1.0), (2, 2.0)], ["a", "b"]) for name in ("x", "y")]
    assert line_chart("two", both, x_label="epoch").count('class="key') == 2
