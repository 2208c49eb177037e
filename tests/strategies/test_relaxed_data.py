from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from relaxed_common import plan_for
from torch import nn

import rankopt
from rankopt._model.inputs import divergence
from rankopt._search.opening import open_problem
from rankopt.errors import (
    BudgetError,
    BudgetInfeasible,
    CalibrationError,
    CheckpointError,
    ModelError,
    RankoptWarning,
)
from rankopt.testing import ModelledClock, check_strategy, planted_inputs, planted_model
from rankopt_strategies import Relaxed, RelaxedSettings

SMALL = RelaxedSettings(low=2, high=14, step=4, shrink=4, warmup=2, updates=8, logit_rate=0.1)


@pytest.mark.parametrize("slopes", ["measured", "gradient"])
def test_distillation_is_no_worse_than_where_it_starts(slopes):
    data = [planted_inputs(128)]
    plan = plan_for("macs<=35%", strategy=Relaxed(rounds=4, slopes=slopes), calibration=data)
    facts = plan.extensions["relaxed"]
    assert facts["loss"] <= facts["first_loss"]
    assert {"soft_loss", "loss", "cost", "entropy"} <= set(facts["steps"][0])
    # Where the annealing ends the mixture, within the budget all the way, and the choice meet.
    assert facts["soft_loss"] == pytest.approx(facts["loss"], rel=0.02)
    last = facts["steps"][-1]
    assert last["soft_loss"] == last["loss"] == pytest.approx(facts["loss"], rel=1e-5)
    assert set(last["surest"]) == {1.0}
    assert all(step["cost"]["macs"] <= 1 + 1e-6 for step in facts["steps"])
    # And both are the loss of the model that the plan makes.
    dense = planted_model(noise=0.4)
    small = rankopt.apply(dense, plan, calibration=data)
    for module in small.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    with torch.no_grad():
        made = divergence(dense(data[0]), small(data[0]))
    assert made == pytest.approx(facts["loss"], rel=0.01)


@pytest.mark.parametrize("slopes", ["measured", "gradient", None])
def test_tied_layers(slopes):
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 24))
    model[2].weight = model[0].weight
    strategy = Relaxed(rounds=2, slopes=slopes) if slopes else Relaxed(mode="paper", paper=SMALL)
    plan = rankopt.search(
        model, "params<=60%", strategy=strategy, calibration=[torch.randn(64, 24)]
    )
    assert set(plan["0"].targets) == {"0", "2"}
    assert plan.changes


def test_inputs_without_a_batch_and_norms_by_keyword():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(24, 24), nn.BatchNorm1d(24)
            self.second = nn.Linear(24, 24)

        def forward(self, scale, x):
            return self.second(self.norm(input=self.first(x) * scale))

    data = [(torch.tensor(2.0), torch.randn(96, 24))]
    strategy = Relaxed(rounds=1, batch_size=32)
    plan = rankopt.search(Odd().eval(), "params<=60%", strategy=strategy, calibration=data)
    assert plan.extensions["relaxed"]["loss"] >= 0


def _opened():
    with torch.no_grad():
        return open_problem(
            planted_model(noise=0.4), rankopt.Budget(params=0.6), example_inputs=planted_inputs(),
            calibration=[planted_inputs(64)], methods=Relaxed.methods,
        ).problem  # fmt: skip


def test_large_outputs_are_compared_in_small_batches(monkeypatch):
    from rankopt_strategies.relaxed import objective as module

    problem = _opened()
    whole = module.distillation(problem, 64, 1.0)
    assert [len(target) for _, target in whole.batches] == [64]
    size = whole.batches[0][1][0].nbytes
    monkeypatch.setattr(module, "OUTPUT_BYTES", module.COPIES * 8 * size)
    monkeypatch.setattr(module, "HELD_BYTES", 24 * size)
    parts = module.distillation(problem, 64, 1.0)
    assert [len(target) for _, target in parts.batches] == [8, 8, 8]


def test_a_search_goes_on_where_outputs_differ_in_the_last_bit(tmp_path):
    from rankopt_strategies.relaxed.objective import distillation
    from rankopt_strategies.relaxed.resuming import Checkpoint

    problem = _opened()
    objective = distillation(problem, 64, 1.0)
    Checkpoint(str(tmp_path), {}, problem, objective, 0.0).save(losses={"a": [1.0]})
    objective.batches[0][1].mul_(1 + 1e-7)
    again = Checkpoint(str(tmp_path), {}, problem, objective, 4e-16)
    assert again.load()["losses"] == {"a": [1.0]}
    objective.batches[0][1].mul_(1.1)  # the same weights and inputs, in another forward
    other = Checkpoint(str(tmp_path), {}, problem, objective, 0.0)
    with pytest.raises(CheckpointError, match="another criterion or model"):
        other.load()


def test_a_choice_survives_the_deadline(monkeypatch):
    from rankopt_strategies.relaxed import refining

    real, closing = refining.closed, []

    def closed(losses, choice, loss, record):
        losses.soft.relaxation.problem.deadline = 0.0
        closing.append(choice.chosen)
        return real(losses, choice, loss, record)

    monkeypatch.setattr(refining, "closed", closed)
    plan = plan_for("macs<=40%", strategy=Relaxed(rounds=1), calibration=[planted_inputs(64)])
    assert closing
    assert plan.changes


@pytest.mark.parametrize("slopes", ["measured", "gradient"])
def test_the_first_choice_survives_the_deadline(monkeypatch, slopes):
    from rankopt_strategies.relaxed import measuring, refining

    def first(losses, *arguments):
        made = real(losses, *arguments)
        losses.soft.relaxation.problem.deadline = 0.0
        return made

    real = refining.first_choice
    for module in (measuring, refining):
        monkeypatch.setattr(module, "first_choice", first)
    strategy = Relaxed(rounds=1, slopes=slopes)
    plan = plan_for("macs<=40%", strategy=strategy, calibration=[planted_inputs(64)])
    assert plan.changes
    assert plan.extensions["relaxed"]["loss"] == plan.extensions["relaxed"]["first_loss"]


@pytest.mark.parametrize("slopes", ["measured", "gradient"])
def test_the_loss_decides_which_layer_keeps_its_rank(slopes):
    # Only the second half of the first layer's outputs reaches the loss.
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.seen(x) + 1e-3 * self.unseen(x)

    model, x = Two(), torch.randn(64, 24)
    with torch.no_grad():
        data = [(x, model(x))]
    task = Relaxed(objective="task", data=data, criterion=F.mse_loss, rounds=12, slopes=slopes)
    plan = rankopt.search(model, "params<=70%", strategy=task, example_inputs=x)
    facts = plan.extensions["relaxed"]
    assert facts["loss"] < 0.9 * facts["first_loss"]
    kept = {d.targets[0]: d.cost["params"][1] for d in plan}
    assert kept["seen"] > kept["unseen"]


def test_a_choice_of_no_finite_loss_is_not_taken():
    calls = []

    def criterion(output, target):
        calls.append(1)
        loss = F.mse_loss(output, target)
        return loss if len(calls) <= 2 else loss * float("nan")  # the dense model, the first choice

    data = [(torch.randn(8, 16),) * 2]
    strategy = Relaxed(
        objective="task", data=data, criterion=criterion, rounds=2, slopes="measured"
    )
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(1, 16)
    facts = rankopt.search(model, "params<=60%", strategy=strategy, example_inputs=x).extensions[
        "relaxed"
    ]
    assert facts["loss"] == facts["first_loss"]
    assert len(calls) > 4


def test_data_is_gone_through_once_for_every_search():
    pairs = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(3)]
    strategy = Relaxed(objective="task", data=iter(pairs), criterion=F.mse_loss, rounds=1)
    again = dataclasses.replace(strategy, rounds=2)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = dict(vars(strategy))
    for made in (strategy, strategy, again):
        rankopt.search(model, "params<=60%", strategy=made, example_inputs=torch.randn(1, 16))
    assert vars(strategy) == before
    assert strategy.data == pairs


def test_the_mode_decides_whether_a_budget_is_needed():
    assert not Relaxed().promises.unbudgeted
    assert Relaxed(mode="paper").promises.unbudgeted
    assert Relaxed(mode="paper").tags is Relaxed.tags


def test_a_measured_search_on_measured_time():
    table = rankopt.ProfileTable(clock=ModelledClock(), rounds=3)
    plan = plan_for(
        "latency<=80%",
        strategy=Relaxed(rounds=1),
        calibration=[planted_inputs(32)],
        profile=table,
    )
    assert plan.changes
    assert plan.extensions["latency"]["high"] <= 0.8


def test_contract_with_calibration():
    check_strategy(Relaxed(rounds=1), calibration=[planted_inputs(32)])


def test_a_gradient_that_is_not_finite_is_said_and_not_followed():
    def criterion(output, target):
        loss = F.mse_loss(output, target)
        return loss * float("nan") if torch.is_grad_enabled() else loss

    strategy = Relaxed(
        objective="task",
        data=[(torch.randn(8, 16),) * 2],
        criterion=criterion,
        rounds=2,
        slopes="gradient",
    )
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.warns(RankoptWarning, match="gradient of the loss is not finite"):
        plan = rankopt.search(
            model, "params<=60%", strategy=strategy, example_inputs=torch.randn(1, 16)
        )
    facts = plan.extensions["relaxed"]
    assert facts["loss"] == facts["first_loss"]


@pytest.mark.parametrize(
    ("data", "criterion", "error", "match"),
    [
        ([], F.mse_loss, CalibrationError, "data= is empty"),
        ([torch.ones(2)], F.mse_loss, CalibrationError, r"expected pairs \(inputs, targets\)"),
        (
            [(torch.randn(4, 16), torch.randn(4, 16))],
            lambda a, b: torch.tensor(float("nan")),
            ModelError,
            "the criterion gives nan for the dense model",
        ),
        (
            [(torch.randn(4, 16), torch.randn(4, 16))],
            lambda a, b: (a - b) ** 2,
            ModelError,
            r"the criterion gave shape \[4, 16\]",
        ),
    ],
)
def test_bad_data(data, criterion, error, match):
    strategy = Relaxed(objective="task", data=data, criterion=criterion)
    with pytest.raises(error, match=match):
        rankopt.search(
            nn.Sequential(nn.Linear(16, 16)),
            "params<=60%",
            strategy=strategy,
            example_inputs=torch.randn(1, 16),
        )


def test_a_loader_of_length_zero():
    with pytest.raises(CalibrationError, match="calibration is empty"):
        plan_for("macs<=50%", calibration=[])


def test_bad_requests():
    with pytest.raises(BudgetInfeasible, match="smallest reachable is params"):
        plan_for("params<=1%")
    with pytest.raises(BudgetError, match="needs a budget"):
        plan_for(None)
    with pytest.raises(ModelError, match="objective='distillation' needs calibration="):
        plan_for("params<=60%", strategy=Relaxed(objective="distillation"))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Relaxed(mode="best"), "mode='best'"),
        (lambda: Relaxed(objective="loss"), "objective='loss'"),
        (lambda: Relaxed(objective="task"), "goes with data="),
        (lambda: Relaxed(data=[1]), "goes with data="),
        (lambda: Relaxed(entropy=0), "entropy=0"),
        (lambda: Relaxed(entropy=2), "entropy=2"),
        (lambda: Relaxed(rounds=0), "rounds=0"),
        (lambda: Relaxed(slopes="guessed"), "slopes='guessed'"),
        (lambda: Relaxed(temperature=0), "temperature=0"),
        (lambda: Relaxed(batch_size=1.5), "batch_size=1.5"),
        (lambda: RelaxedSettings(low=0), "low=0"),
        (lambda: RelaxedSettings(low=20, high=10), "the set of candidates is empty"),
        (lambda: RelaxedSettings(step=200), "step=200: larger than the range"),
        (lambda: RelaxedSettings(shrink=1), "shrink=1"),
        (lambda: RelaxedSettings(gamma=float("nan")), "gamma=nan"),
        (lambda: RelaxedSettings(beta="a"), "beta='a'"),
    ],
)
def test_settings_are_validated(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_published_search_on_data_in_half_precision(dtype):
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).to(dtype)
    plan = rankopt.search(
        model,
        "params<=60%",
        strategy=Relaxed(mode="paper", paper=SMALL),
        calibration=[torch.randn(64, 24).to(dtype)],
    )
    assert plan.changes
