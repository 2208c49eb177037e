from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import rankopt
from rankopt._commands import specs
from rankopt.cli import main
from rankopt.errors import ModelError, RankoptError, RankoptWarning
from rankopt.strategy import Problem, Strategy

MODELS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(),
                         nn.Linear(16 * 16, 10))

def broken():
    raise RuntimeError("no data today")

def number():
    return 3

def accuracy(model):
    return 12.5

def nan(model):
    return float("nan")

def train():
    torch.manual_seed(0)
    return [(torch.randn(32, 8, 8, 8), torch.randint(10, (32,))) for _ in range(3)]
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "my_models.py"
    path.write_text(MODELS)
    return f"{path}:build"


def run(*arguments):
    return main([str(argument) for argument in arguments])


INPUT = ("--input", "1,8,8,8")


def test_search_apply_compare(spec, tmp_path, capsys):
    plan, out = tmp_path / "plan.json", tmp_path / "out.safetensors"
    assert run("search", spec, "--budget", "macs<=50%", *INPUT, "-o", plan) == 0
    text = capsys.readouterr().out
    assert "tucker2" in text
    assert f"plan written to {plan}" in text
    assert run("apply", spec, plan, "-o", out) == 0
    assert "sites decomposed" in capsys.readouterr().out
    accuracy = spec.replace(":build", ":accuracy")
    arguments = ("compare", spec, out, *INPUT, "--rounds", 3, "--evaluate", accuracy)
    assert run(*arguments) == 0
    assert "12.5" in capsys.readouterr().out
    assert run(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs"]["after"] <= 0.5 * found["macs"]["before"]
    assert run("compare", spec, plan, "--json") == 0
    assert json.loads(capsys.readouterr().out)["macs"] is None


def test_metrics_of_other_weights_are_warned_of(spec, tmp_path, capsys):
    plan, out = tmp_path / "plan.json", tmp_path / "out.safetensors"
    assert run("search", spec, "--budget", "params<=60%", "-o", plan) == 0
    assert run("apply", spec, plan, "-o", out) == 0
    assert "no --weights" not in capsys.readouterr().err
    metric = ("--evaluate", spec.replace(":build", ":accuracy"))
    assert run("compare", spec, out, *metric) == 0
    for made in (out, plan):
        with pytest.warns(RankoptWarning, match="other weights"):
            assert run("compare", spec, made, *metric, "--seed", 1) == 0


def test_reports_of_folders_need_a_page(tmp_path, capsys):
    assert run("report", tmp_path) == 1
    assert f"{tmp_path} is no plan file: draw it as a page, -o REPORT.html" in (
        capsys.readouterr().err
    )


def test_calibration_and_evaluate(spec, tmp_path, capsys):
    """A plan made with data is applied and compared with the same, all from the shell."""
    plan, out = tmp_path / "plan.json", tmp_path / "out.safetensors"
    data = ("--calibration", spec.replace(":build", ":train"))
    metric = ("--evaluate", spec.replace(":build", ":accuracy"))
    wanted = ("--budget", "metric_drop<=0.5, minimize=params", "-o", plan)
    assert run("search", spec, *wanted, *INPUT, *data, *metric) == 0
    assert run("apply", spec, plan, "-o", out) == 1
    assert "calibration" in capsys.readouterr().err
    assert run("apply", spec, plan, *data, "-o", out) == 0
    assert run("compare", spec, plan, *data) == 0
    broken = ("--calibration", spec.replace(":build", ":broken"))
    assert run("apply", spec, plan, *broken, "-o", out) == 1
    assert "failed: RuntimeError: no data today" in capsys.readouterr().err


def test_compress(spec, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    there = spec.replace(":build", "")
    arguments = (
        "compress", spec, "--budget", "params<=60%", "--train", f"{there}:train", "--evaluate",
        f"{there}:accuracy", "--recover", 2, "--epochs", 2, "--freezing", "fixed", "-o", out,
    )  # fmt: skip
    assert run(*arguments) == 0
    text = capsys.readouterr().out
    assert "finetune" in text
    assert f"{out} written" in text
    nan = ("--evaluate", f"{there}:nan")  # which JSON has no word for
    assert run(*arguments, "--json", "--epochs", 0, "--recover", 0, *nan) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["comparison"]["metric"] == {"before": None, "after": None}
    assert [stage["name"] for stage in found["stages"]] == ["search", "apply", "verify"]
    assert run("compare", spec, out) == 0


def test_compress_freezes_a_front(spec, tmp_path, capsys):
    out, folder = tmp_path / "out.safetensors", tmp_path / "run"
    arguments = ("compress", spec, "--budget", "params<=60%", "--recover", 0, "-o", out)
    train = ("--train", spec.replace(":build", ":train"), "--epochs", 4, "--final-epochs", 2)
    fronts = ("--front", "2:0:1", "--front", "2:3")
    assert run(*arguments, *train, *fronts, "--folder", folder, "--json") == 0
    (record,) = folder.rglob("record.jsonl")
    events = [json.loads(line) for line in record.read_text().splitlines()]
    frozen = [event["frozen"] for event in events if event["event"] == "epoch"]
    assert frozen[0] > frozen[1] > frozen[2] == 0 < frozen[3] < frozen[0]
    assert "Sequential(parity=0).front('2', 0, 1).front('2', 3)" in events[0]["freezing"]
    for front, message in (
        ("2:3:3", "front '2:3:3': expected MODULE:START"),
        ("nine:0", "front('nine'): the model has no module of this name"),
    ):
        capsys.readouterr()
        assert run(*arguments, *train, "--front", front) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert not captured.out
    assert run(*arguments, "--front", "2:0") == 1
    assert "--front is of fine-tuning" in capsys.readouterr().err


def test_compress_takes_the_options_of_a_search(spec, tmp_path, capsys):
    train = ("--train", spec.replace(":build", ":train"), "--epochs", 0, "--recover", 0)
    choices = ("--round-to", 4, "--fisher", "--asymmetric")
    options = ("--ignore", "4", "--methods", " tucker2 ", *choices)
    out = ("-o", tmp_path / "out.safetensors", "--json")
    assert run("compress", spec, "--budget", "params<=80%", *train, *options, *out) == 0
    decisions = json.loads(capsys.readouterr().out)["plan"]["decisions"]
    assert {d["method"] for d in decisions} == {"keep", "tucker2"}
    assert all(d["method"] == "keep" for d in decisions if d["targets"] == ["4"])
    refused = ("--train", spec.replace(":build", ":train"), "--recover", -3)
    assert run("compress", spec, "--budget", "params<=80%", *refused, *out) == 1
    assert "seconds=-3.0: expected a positive number" in capsys.readouterr().err


def test_torchvision_needs_nothing_else(tmp_path, capsys):
    arguments = ("search", "torchvision:mobilenet_v3_small", "--budget", "macs<=50%", "--json")
    assert run(*arguments, "--strategy", "parameter_ratio") == 0
    captured = capsys.readouterr()
    assert "no --weights: random weights" in captured.err
    plan = json.loads(captured.out)
    assert plan["totals"]["macs"]["measured"] <= 0.5 * plan["totals"]["macs"]["before"]


def test_settings_and_globs(spec, capsys):
    arguments = ("search", spec, "--strategy", "vbmf", "--json")
    assert run(*arguments, "--set", "noise=compress", "--set", "weakening=0.5") == 0
    assert json.loads(capsys.readouterr().out)["strategy"]["settings"] == {
        "noise": "compress", "weakening": 0.5,
    }  # fmt: skip
    code = run("search", spec, "--budget", "params<=90%", "--ignore", "4", "--methods", "tucker2",
               "--json")  # fmt: skip
    assert code == 0
    methods = {d["method"] for d in json.loads(capsys.readouterr().out)["decisions"]}
    assert methods == {"keep", "tucker2"}


def test_weights(spec, tmp_path, capsys):
    from safetensors.torch import save_file

    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3),
        torch.nn.Flatten(), torch.nn.Linear(256, 10),
    )  # fmt: skip
    state = model.state_dict()
    state["4.weight"][:] = 0
    for name in ("w.safetensors", "w.pt"):
        path = tmp_path / name
        save_file(state, path) if name.endswith("s") else torch.save(state, path)
        assert run("search", spec, "--budget", "params<=95%", "--weights", path, "--json") == 0
        reasons = [d["reason"] for d in json.loads(capsys.readouterr().out)["decisions"]]
        assert "keep: its weight is all zero" in reasons


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight


def test_weights_of_training_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(specs, "load_callable", lambda spec: Tied)
    weight = torch.randn(9, 8)
    named = {"table.weight": weight, "head.weight": weight}
    for number, content in enumerate((
        {"model": named, "epoch": 3},
        {"state_dict": {f"module._orig_mod.{name}": value for name, value in named.items()}},
        {f"_orig_mod.{name}": value for name, value in named.items()},
        {"table.weight": weight},
    )):  # fmt: skip
        torch.save(content, tmp_path / f"{number}.pt")
        model = specs.load_model("x", tmp_path / f"{number}.pt")
        assert torch.equal(model.head.weight, weight)
    torch.save({"other": weight}, tmp_path / "o.pt")
    with pytest.raises(ModelError, match=r"Missing key.*table.weight.*Unexpected key.*other"):
        specs.load_model("x", tmp_path / "o.pt")
    torch.save([weight], tmp_path / "l.pt")
    with pytest.raises(ModelError, match="holds a list, not a state dict"):
        specs.load_model("x", tmp_path / "l.pt")


def test_files_run_once_and_may_import_late(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "late_sibling.py").write_text("VALUE = 7")
    (tmp_path / "once.py").write_text(
        "runs = []\ndef late():\n    import late_sibling\n    return late_sibling.VALUE, runs\n"
    )
    monkeypatch.chdir(tmp_path)
    value, runs = specs.load_callable(f"{tmp_path}/once.py:late")()
    assert value == 7
    assert specs.load_callable("once.py:late")()[1] is runs


def test_modules_of_the_working_folder(tmp_path):
    (tmp_path / "in_this_folder.py").write_text(MODELS)
    command = [str(Path(sys.executable).with_name("rankopt")), "search", "in_this_folder:number"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "returned a int, not a torch.nn.Module" in found.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("search", "SPEC", "-o", "nodir/p.json"), "cannot write nodir/p.json"),
        (("search", "SPEC", "-o", "."), "it is a folder; name a file in it"),
        (("apply", "SPEC", "p.json", "-o", "out.pt"), "name the file *.safetensors"),
        (("profile", "SPEC", "--layer", "0", *INPUT, "--plot", "x.png"), "end the name in .html"),
        (
            ("compress", "SPEC", "-o", "m.safetensors", "--epochs", "3"),
            "--epochs is of fine-tuning",
        ),
        (("profile", "SPEC", "--layer", "0", *INPUT, "--plot", "no/x.html"), "cannot write no/"),
        (("study", "best", "-o", "nodir/p.json"), "cannot write nodir/p.json"),
    ],
)
def test_outputs_are_checked_before_the_work(tmp_path, monkeypatch, capsys, command, message):
    """No model is even made."""
    monkeypatch.chdir(tmp_path)
    assert run(*(part.replace("SPEC", "no.py:build") for part in command)) == 1
    assert message in capsys.readouterr().err


def test_a_plan_that_cannot_be_written_is_printed(spec, tmp_path, capsys, monkeypatch):
    def full(plan, path):
        raise RankoptError("no space left")

    monkeypatch.setattr(rankopt.RankPlan, "save", full)
    assert run("search", spec, "--budget", "params<=60%", "-o", tmp_path / "p.json") == 1
    assert "sites decomposed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--budget", "0.5"), 1, "does not say of what"),
        (("--budget", "params<=0.1%"), 3, "smallest reachable is params"),
        (("--budget", "macs<=50%"), 1, "needs example_inputs"),
        (("--budget", "params<=50%", "--strategy", "x"), 1, "unknown strategy 'x'"),
        (("--strategy", "energy", "--set", "threshold=7"), 1, "threshold=7"),
        (("--strategy", "energy", "--set", "threshold"), 1, "expected KEY=VALUE"),
        (("--strategy", "energy", "--set", "x=1"), 1, "has no setting x"),
        (("--budget", "params<=50%", "--input", "1,x"), 1, "expected a shape"),
        (("--budget", "params<=50%", "--input", "1,2:int7"), 1, "unknown dtype 'int7'"),
        (("--budget", "params<=50%", "--input", "1,3,8,8"), 1, "fails on example_inputs"),
        (("--budget", "params<=50%", "--weights", "/no/file.pt"), 1, "cannot load weights"),
        (("--budget", "params<=50%", "-o", "/proc/p.json"), 1, "cannot write /proc/p.json"),
    ],
)
def test_mistakes_get_a_sentence_and_a_code(spec, capsys, arguments, code, message):
    assert run("search", spec, *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("rankopt: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "no data today"),
        ("number", "returned a int, not a torch.nn.Module"),
        ("missing", "has no callable 'missing'; it has "),
    ],
)
def test_broken_builders(spec, capsys, name, message):
    assert run("search", spec.replace(":build", f":{name}"), "--budget", "params<=50%") == 1
    assert message in capsys.readouterr().err


def test_broken_specs(tmp_path, capsys):
    bad = tmp_path / "bad.py"
    bad.write_text("import nothing_like_this")
    for model, message in (
        ("torchvision:resnet19", "did you mean resnet"),
        ("resnet50", "expected FILE.py:NAME"),
        (f"{tmp_path}/none.py:build", "does not exist"),
        (f"{bad}:build", "fails to import: ModuleNotFoundError"),
        ("no.such.module:build", "fails to import"),
    ):
        assert run("search", model, "--budget", "params<=50%") == 1
        assert message in capsys.readouterr().err


def test_damaged_files(spec, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text("{")
    assert run("apply", spec, plan, "-o", tmp_path / "o.safetensors") == 1
    assert "no valid JSON" in capsys.readouterr().err
    broken = tmp_path / "b.safetensors"
    broken.write_bytes(b"123")
    assert run("compare", spec, broken) == 1
    assert "truncated" in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()


def test_strategies(capsys):
    assert run("strategies") == 0
    assert "parameter_ratio" in capsys.readouterr().out
    assert run("strategies", "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names == sorted(names)


def test_strategies_of_plug_ins(capsys):
    class Bare(Strategy):
        def search(self, problem):
            raise NotImplementedError

    @dataclass
    class Failing(Bare):
        def __post_init__(self):
            raise OSError("no licence")

    for name, cls in (("bare", Bare), ("failing", Failing)):
        rankopt.strategies.register(name)(cls)
    try:
        assert run("strategies") == 0
        assert "no licence" in capsys.readouterr().out
        assert run("strategies", "--json") == 0
    finally:
        for name in ("bare", "failing"):
            rankopt.strategies.unregister(name)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["bare"]["summary"] == ""
    assert "OSError: no licence" in rows["failing"]["error"]


def test_interrupt_leaves_nothing(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Problem, "frontier", lambda *_: signal.raise_signal(signal.SIGINT))
    before = sorted(tmp_path.iterdir())
    # A shell's background jobs begin with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("search", spec, "--budget", "params<=50%", "-o", tmp_path / "p.json") == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "no output was written" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_usage_errors_exit_with_two():
    with pytest.raises(SystemExit) as found:
        run("search")
    assert found.value.code == 2


@pytest.mark.parametrize(
    "command", [[str(Path(sys.executable).with_name("rankopt"))], [sys.executable, "-m", "rankopt"]]
)
def test_as_a_process(command):
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout[:8] == "rankopt "


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    assert run("demo", "--json", "--output", tmp_path) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dense_accuracy"] > 95
    assert {row["strategy"] for row in result["rows"]} == set(rankopt.strategies.names())
    assert all(row["macs_ratio"] <= 0.5 for row in result["rows"])
    assert (tmp_path / "digits.safetensors").exists()
    assert (tmp_path / "digits-plan.json").exists()


def test_an_empty_range_of_ranks(spec, capsys):
    assert run("profile", spec, "--layer", "0", *INPUT, "--ranks", "10:5") == 1
    assert "no rank lies between" in capsys.readouterr().err


def test_a_file_named_as_a_module_in_use(tmp_path):
    before = sys.modules["json"]
    path = tmp_path / "json.py"
    path.write_text(MODELS)
    assert len(list(specs.load_model(f"{path}:build"))) == 5
    assert sys.modules["json"] is before
