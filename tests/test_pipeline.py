from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn

import rankopt
from rankopt._pipeline import stages
from rankopt.errors import BudgetError, CheckpointError, ModelError, RankoptError
from rankopt.testing import planted_inputs, planted_model

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def task():
    """A dense model, labelled batches, and its metric."""
    dense = planted_model(noise=0.5)
    x = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = dense(x).argmax(dim=1)
    train = list(zip(x.split(32), y.split(32), strict=True))
    return dense, train, lambda model: 100 * (model(x).argmax(dim=1) == y).float().mean().item()


QUICK = {"recover": {"steps": 20}, "finetune": {"epochs": 2, "learning_rate": 3e-3}}


def test_one_call(task, tmp_path):
    dense, train, evaluate = task
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    done = rankopt.compress(
        dense, "params<=30%", train=train, evaluate=evaluate, output=tmp_path / "s.safetensors",
        **QUICK,
    )  # fmt: skip
    names = [stage.name for stage in done.stages]
    assert names == ["search", "apply", "recover", "finetune", "verify"]
    metrics = [stage.metric for stage in done.stages]
    assert metrics[0] is None
    assert metrics[4] == metrics[3]
    assert done.comparison.params.ratio <= 0.3
    assert done.comparison.metric.before == 100
    assert done.comparison.latency_ratio is not None
    again = rankopt.load(planted_model(), tmp_path / "s.safetensors").eval()
    assert torch.equal(again(planted_inputs()), done.model(planted_inputs()))
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert all(torch.equal(before[n], v) for n, v in dense.state_dict().items())
    text = str(done)
    assert "outputs identical" in text
    assert "recovered for" in text
    assert re.search(r"^ dense +– +[\d.]+ k +100 *$", text, re.M)
    assert json.loads(json.dumps(done.to_dict()))["stages"][4]["name"] == "verify"


def test_every_stage_can_be_replaced_or_left_out(task):
    dense, train, _ = task
    calls = []

    def search(model, budget):
        calls.append("search")
        return rankopt.search(model, budget, strategy="parameter_ratio")

    def apply(model, plan):
        calls.append("apply")
        return rankopt.apply(model, plan)

    def tune(small, teacher, folder):
        calls.append("finetune")
        assert teacher is dense
        return "as it was"

    done = rankopt.compress(
        dense, "params<=40%", train=train, search=search, apply=apply, finetune=tune, recover=False
    )
    assert calls == ["search", "apply", "finetune"]
    assert [s.name for s in done.stages] == ["search", "apply", "finetune", "verify"]
    assert done.stages[2].note == "as it was"
    assert done.plan.strategy["name"] == "parameter_ratio"
    assert done.path is None
    bare = rankopt.compress(dense, "params<=40%")
    assert [s.name for s in bare.stages] == ["search", "apply", "verify"]


def test_goes_on_where_it_was_interrupted(task, tmp_path, monkeypatch):
    dense, train, evaluate = task
    arguments = {"train": train, "evaluate": evaluate, "folder": tmp_path / "work", **QUICK}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages, "train_on", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rankopt.compress(dense, "params<=30%", **arguments)
    kept = {p.name for p in (tmp_path / "work").iterdir()}
    assert kept == {"plan.json", "apply.safetensors", "recover.safetensors", "work.json"}
    with monkeypatch.context() as patched:  # what was done is not done again
        patched.setattr(stages, "search", interrupted)
        patched.setattr(stages, "recover", interrupted)
        done = rankopt.compress(dense, "params<=30%", **arguments)
    assert [s.name for s in done.stages] == ["search", "apply", "recover", "finetune", "verify"]
    assert done.path == tmp_path / "work" / "compressed.safetensors"
    assert (tmp_path / "work/training/record.jsonl").exists()
    with pytest.raises(CheckpointError, match="made with budgets"):
        rankopt.compress(dense, "params<=40%", **arguments)
    with pytest.raises(CheckpointError, match="made with settings"):
        rankopt.compress(dense, "params<=30%", **{**arguments, "recover": False})
    (tmp_path / "work/work.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        rankopt.compress(dense, "params<=30%", **arguments)


def test_a_loader_with_a_generator_of_its_own_goes_on(tmp_path):
    x = torch.randn(64, 16)
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    order = torch.Generator().manual_seed(3)
    train = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, generator=order)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    arguments = {"train": train, "folder": tmp_path, **QUICK}
    first, again = (rankopt.compress(dense, "params<=50%", **arguments) for _ in range(2))
    assert torch.equal(first.model(x), again.model(x))


def test_rounds_reach_the_budget_in_steps(task, tmp_path):
    dense, train, _ = task
    done = rankopt.compress(
        dense, "params<=25%", train=train, rounds=2, recover=False,
        finetune={"epochs": 1}, folder=tmp_path,
    )  # fmt: skip
    names = [stage.name for stage in done.stages]
    assert names == [f"{s} {n}" for n in (1, 2) for s in ("search", "apply", "finetune")] + [
        "verify"
    ]
    sizes = [stage.params for stage in done.stages if stage.name.startswith("apply")]
    total = done.comparison.params.before
    assert 0.4 < sizes[0] / total <= 0.5
    assert sizes[1] / total <= 0.25
    # The second round decomposed what the first had trained, not the original.
    first = rankopt.load(planted_model(), tmp_path / "finetune-1.safetensors")
    assert rankopt.RankPlan.load(tmp_path / "plan-2.json").model["weights"] not in (
        rankopt.RankPlan.load(tmp_path / "plan-1.json").model["weights"], None
    )  # fmt: skip
    assert first(planted_inputs()).shape == done.model(planted_inputs()).shape


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "rounds=0"),
        ({"seed": None}, ValueError, "seed=None"),
        ({"calibration_samples": 0}, ValueError, "calibration_samples=0"),
        ({"recover": lambda small, teacher: planted_model()}, ModelError, "another model"),
        ({"search": 3}, ValueError, "search=3"),
        ({"recover": True}, ValueError, "recover=True: .*or False"),
        ({"finetune": {"epochs": 2}}, ValueError, "finetune= needs train="),
        ({"recover": {"seconds": 2}}, ValueError, "recover= needs calibration= or train="),
        ({"output": "m.pt"}, CheckpointError, r"name the file \*.safetensors"),
        ({"output": "/nowhere/m.safetensors"}, CheckpointError, "folder does not exist"),
        ({"search": lambda model, budget: 3}, ModelError, "search returned a int"),
        ({"apply": lambda model, plan: 3}, ModelError, "apply returned a int"),
        ({"budget": "latency_ms<=8", "rounds": 2}, BudgetError, "latency_ms is not"),
    ],
)
def test_bad_requests(settings, error, message):
    settings = {"budget": "params<=50%", **settings}
    with pytest.raises(error, match=message):
        rankopt.compress(planted_model(), settings.pop("budget"), **settings)


@pytest.mark.parametrize("strategy", ["knapsack", rankopt.strategies.create("knapsack")])
def test_a_search_that_uses_the_metric_is_given_it(task, strategy):
    dense, train, evaluate = task
    done = rankopt.compress(
        dense, "metric_drop<=5, minimize=params", train=train, evaluate=evaluate,
        search={"strategy": strategy}, recover=False, finetune=False,
    )  # fmt: skip
    assert done.comparison.params.ratio < 1
    assert done.comparison.metric.after >= done.comparison.metric.before - 5


def test_a_result_above_its_budget_is_refused():
    def loose(model, budget):
        from dataclasses import replace

        found = rankopt.search(model, "params<=90%")
        return replace(found, budget=budget)

    with pytest.raises(RankoptError, match="above the budget"):
        rankopt.compress(planted_model(), "params<=20%", search=loose)
    with pytest.raises(RankoptError, match="above the budget"):  # nor where its plan has another
        rankopt.compress(
            planted_model(), "params<=20%", search=lambda m, b: rankopt.search(m, "params<=90%")
        )


@pytest.mark.parametrize("raised", [RankoptError, KeyboardInterrupt])
def test_a_refused_result_leaves_an_earlier_output_alone(tmp_path, monkeypatch, raised):
    def refuse(*_, **__):
        raise raised("no")

    path = tmp_path / "out.safetensors"
    rankopt.compress(planted_model(), "params<=50%", output=path)
    before = path.read_bytes()
    monkeypatch.setattr(stages, "compare", refuse)
    with pytest.raises(raised):
        rankopt.compress(planted_model(), "params<=30%", output=path, folder=tmp_path / "work")
    assert path.read_bytes() == before
    kept = {p.name for p in (tmp_path / "work").iterdir()}
    assert kept == {"plan.json", "apply.safetensors", "work.json"}


def test_a_compiled_original_is_timed_as_the_result_is(monkeypatch):
    compared = []

    def seen(original, compressed, **settings):
        compared.append(original)
        return rankopt.compare(original, compressed, rounds=3, **settings)

    monkeypatch.setattr(stages, "compare", seen)
    dense = planted_model()
    compiled = torch.compile(dense, backend="eager")
    rankopt.compress(compiled, "params<=50%", example_inputs=planted_inputs())
    assert compared == [dense]


def test_a_model_of_one_layer():
    done = rankopt.compress(nn.Sequential(nn.Linear(64, 64)), "params<=50%")
    assert done.comparison.params.ratio <= 0.5


def test_a_model_that_draws_numbers_in_eval_mode():
    class Sampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc(x) + torch.randn(32)

    done = rankopt.compress(Sampling(), "params<=60%", example_inputs=torch.randn(4, 32))
    assert done.comparison.params.ratio <= 0.6


class Boxed:
    """An output that tensors cannot be read from."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(("boxed", "note"), [(True, "read back"), (False, "outputs identical")])
def test_outputs_are_identical_where_they_were_compared(boxed, note):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            found = self.fc(x.sub_(0.5))  # writes into its input
            return Boxed(found) if boxed else found

    done = rankopt.compress(Net(), "params<=60%", example_inputs=torch.randn(4, 32))
    assert done.stages[-1].note.endswith(note)


def test_counting_leaves_the_model_as_it_is_and_sees_attention():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.BatchNorm1d(4), nn.MultiheadAttention(32, 4)
            self.body, self.head = nn.Linear(32, 128), nn.Linear(128, 8)

        def forward(self, x):
            x = self.norm(x)
            return self.head(self.body(self.attention(x, x, x)[0]).relu())

    torch.manual_seed(0)
    model, x = Attending().train(), torch.randn(16, 4, 32)
    kept = copy.deepcopy(model.state_dict())
    done = rankopt.compress(model, "macs<=90%", example_inputs=x)
    assert done.comparison.macs.ratio <= 0.9
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
