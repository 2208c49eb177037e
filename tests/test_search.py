from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
from torch import nn

import rankopt
from rankopt._utils.progress import progress_bar
from rankopt.errors import (
    BudgetError,
    BudgetInfeasible,
    CalibrationError,
    DeadlineExceeded,
    LayerError,
    ModelError,
    PlanError,
    RankoptError,
    RegistryError,
)
from rankopt.strategy import Strategy
from rankopt.testing import ModelledClock, planted_inputs, planted_model


def test_one_line():
    plan = rankopt.search(planted_model(), "params<=50%")
    assert plan.strategy["name"] == "knapsack"
    assert plan.totals["params"]["measured"] <= 0.5 * plan.totals["params"]["before"]
    assert set(plan.layer_names) == {
        "stem", "conv", "grouped", "depthwise", "point", "hidden", "head",
    }  # fmt: skip
    assert plan["depthwise"].reason == "keep: depthwise: each group has one input channel"
    assert plan["stem"].reason == "keep: only 3 input and 16 output channels"
    assert plan.environment["torch"] == torch.__version__
    assert plan.seconds > 0


@dataclasses.dataclass(frozen=True)
class Handmade(rankopt.Strategy):
    """A plan without totals, made by hand."""

    name: ClassVar[str] = "handmade"
    rank: int = 1

    def search(self, problem):
        hidden = rankopt.Decision(["hidden"], [[48, 32]], "svd", {"ranks": [self.rank]})
        return rankopt.RankPlan(model={}, decisions=(hidden,), strategy=self.describe(0))


def test_plans_made_by_hand_are_held_to_the_budget_that_was_asked_for():
    model = nn.Sequential(OrderedDict(hidden=nn.Linear(32, 48)))
    plan = rankopt.search(model, "params<=20%", strategy=Handmade())
    assert plan.budget == rankopt.Budget(params=0.2)
    assert plan == rankopt.RankPlan.from_json(plan.to_json())
    assert plan.decisions == rankopt.RankPlan.from_json(plan.to_json()).decisions
    with pytest.raises(RankoptError, match="'handmade' .* breaks its budget .params at most 20%"):
        rankopt.search(model, "params<=20%", strategy=Handmade(rank=8))
    with pytest.raises(RankoptError, match=r"without totals of latency, .* problem.plan\(\)"):
        rankopt.search(
            model,
            "latency<=90%",
            strategy=Timed(),
            example_inputs=torch.ones(2, 32),
            profile=rankopt.ProfileTable(clock=ModelledClock()),
        )


class Timed(Handmade):
    tags: ClassVar[rankopt.Tags] = rankopt.Tags(latency=True)


@pytest.mark.parametrize("pattern", [nn.Linear, nn.Linear(2, 2)])
def test_a_class_or_a_module_is_no_pattern(pattern):
    for given in (pattern, [pattern]):
        with pytest.raises(ModelError, match=r"ignore: got a .*give the module's name"):
            rankopt.search(planted_model(), "params<=90%", ignore=given)


def test_globs():
    plan = rankopt.search(planted_model(), "params<=90%", only=["h*", "conv"], ignore=["head"])
    assert plan["head"].reason == "keep: ignored by the user"
    assert plan["point"].reason == "keep: not among only="
    assert {d.targets[0] for d in plan.changes} <= {"hidden", "conv"}
    for keyword in ("only", "ignore"):
        with pytest.raises(ModelError, match=f"{keyword}='H\\*' matches no layer; the layers are"):
            rankopt.search(planted_model(), "params<=90%", **{keyword: "H*"})
    with pytest.raises(ModelError, match="expected a glob"):
        rankopt.search(planted_model(), "params<=90%", only=[3])


@pytest.mark.parametrize(
    ("budget", "arguments", "error", "match"),
    [
        (0.5, {}, BudgetError, "does not say of what"),
        ("macs<=50%", {}, BudgetError, "needs example_inputs"),
        ("latency<=70%", {}, BudgetError, "budget on latency needs example_inputs: time depends"),
        ("latency_ms<=7", {}, BudgetError, "budget on latency_ms needs example_inputs"),
        (None, {"strategy": "profiled"}, ModelError, "'profiled' needs example_inputs= to time"),
        ("metric_drop<=1, minimize=macs", {}, BudgetError, "needs example_inputs"),
        ("metric_drop<=1, minimize=params", {}, BudgetError, "metric_drop needs evaluate="),
        (
            "params<=50%",
            {"strategy": "magic"},
            RegistryError,
            "unknown strategy 'magic'; known: en",
        ),
        ("params<=50%", {"strategy": 3}, RegistryError, "a name or an instance of Strategy"),
        ("params<=50%", {"methods": ["magic"]}, RegistryError, "unknown decomposition 'magic'"),
        ("params<=50%", {"evaluate": len}, BudgetError, "uses evaluate= only with"),
        ("params<=50%", {"calibration": []}, CalibrationError, "calibration is empty"),
        ("params<=50%", {"example_inputs": "x"}, ModelError, "example_inputs is a str"),
        ("params<=50%", {"example_inputs": torch.zeros(1, 4)}, ModelError, "fails on example_inp"),
    ],
)
def test_bad_requests(budget, arguments, error, match):
    with pytest.raises(error, match=match):
        rankopt.search(planted_model(), budget, **arguments)


def test_infeasible_budget_says_the_smallest():
    with pytest.raises(BudgetInfeasible, match=r"smallest reachable is params [\d.]+%") as found:
        rankopt.search(planted_model(), "params<=1%")
    smallest = found.value.smallest["params"]
    plan = rankopt.search(planted_model(), f"params<={smallest + 1e-9}")
    assert plan.totals["params"]["measured"] / plan.totals["params"]["before"] <= smallest + 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad):
    model = planted_model()
    model.conv.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(LayerError, match=r"layer conv: .*holds 1 NaN or infinite.*ignore"):
        rankopt.search(model, "params<=50%")
    assert rankopt.search(model, "params<=80%", ignore=["conv"])["conv"].keeps


def test_huge_finite_weights_are_fine():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].weight.data.mul_(1e38)
    assert rankopt.search(model, "params<=60%").changes


def test_zero_weights_are_kept():
    model = planted_model()
    model.conv.weight.data.zero_()
    plan = rankopt.search(model, "params<=80%")
    assert plan["conv"].reason == "keep: its weight is all zero"


def test_nothing_to_decompose():
    with pytest.raises(ModelError, match=r"Sequential has no layer to decompose \(no weights\)"):
        rankopt.search(nn.Sequential(nn.ReLU()), "params<=50%")
    with pytest.raises(ModelError, match="0: Embedding is not a layer"):
        rankopt.search(nn.Sequential(nn.Embedding(4, 4)), "params<=50%")


def test_other_layer_forms_are_listed_with_reasons():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda *_: None)
    graded = nn.Linear(16, 16)
    graded.register_full_backward_pre_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "good": nn.Linear(16, 16),
            "special": Special(16, 16),
            "hooked": hooked,
            "graded": graded,
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            "transposed": nn.ConvTranspose2d(8, 8, 3),
            "lstm": nn.LSTM(8, 8),
            "narrow": nn.Linear(16, 2),
            "integer": nn.Linear(16, 16),
        }
    )
    model["integer"].weight = nn.Parameter(
        torch.ones(16, 16, dtype=torch.int8), requires_grad=False
    )
    plan = rankopt.search(model, "params<=95%")
    reasons = {d.targets[0]: d.reason for d in plan if d.keeps}
    assert "Special is a subclass of Linear" in reasons["special"]
    assert "hooks are attached" in reasons["hooked"]
    assert "hooks are attached" in reasons["graded"]
    assert "ParametrizedLinear is a subclass" in reasons["normed"]
    assert "ConvTranspose2d is not a layer" in reasons["transposed"]
    assert "LSTM is not a layer" in reasons["lstm"]
    assert "only 16 input and 2 output" in reasons["narrow"]
    assert "int8, not floating point" in reasons["integer"]
    assert [d.targets for d in plan.changes] == [("good",)]


def test_old_style_weight_norm_is_kept():
    with pytest.warns(FutureWarning, match="weight_norm"):
        normed = nn.utils.weight_norm(nn.Linear(16, 16))
    plan = rankopt.search(nn.Sequential(normed, nn.Linear(16, 16)), "params<=95%")
    assert plan["0"].keeps


def test_dictionary_inputs_and_their_device():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, *, a, b=None):
            return self.fc(a) if b is None else self.fc(a) + b

    inputs = {"a": torch.randn(2, 32), "b": torch.ones(2, 32)}
    plan = rankopt.search(Two(), "macs<=50%", example_inputs=inputs)
    assert plan.totals["macs"]["before"] == 2 * 32 * 32


def test_methods_can_be_limited_and_configured():
    plan = rankopt.search(planted_model(), "params<=90%", methods=["svd"])
    assert {d.method for d in plan.changes} == {"svd"}
    assert "tucker2" not in plan["conv"].reason
    assert "svd takes linear layers and 1x1" in plan["conv"].reason
    last = rankopt.decompositions.create("svd", stride_on="last")
    plan = rankopt.search(planted_model(), None, strategy="parameter_ratio", methods=[last])
    assert plan["point"].args == {"ranks": [9], "stride_on": "last"}
    small = rankopt.apply(planted_model(), plan)
    assert small.point.first.stride == (1, 1)
    assert small.point.last.stride == (2, 2)


def test_attention_matmuls_count():
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    plan = rankopt.search(model, "params<=60%", example_inputs=(x, x, x))
    projections = 2 * 5 * 32 * (96 + 32)
    products = 2 * 2 * 5 * 5 * 32
    assert plan.totals["macs"]["before"] == projections + products


def test_more_than_one_axis():
    plan = rankopt.search(
        planted_model(), "macs<=60%, params<=40%, memory<=45%", example_inputs=planted_inputs()
    )
    for axis, share in (("macs", 0.6), ("params", 0.4), ("memory", 0.45)):
        assert plan.totals[axis]["measured"] <= share * plan.totals[axis]["before"]


def test_the_whole_budget_keeps_everything():
    plan = rankopt.search(planted_model(), "params<=100%")
    assert not plan.changes
    assert (
        not rankopt.compare(planted_model(), rankopt.apply(planted_model(), plan)).params.ratio < 1
    )


def test_functions_of_a_layer_choose_too():
    plan = rankopt.search(
        planted_model(),
        "params<=90%",
        only=lambda layer: layer.type == "Conv2d" and layer.params > 1000,
        ignore=[lambda layer: layer.kernel == (1, 1)],
    )
    assert plan["hidden"].reason == "keep: not among only="
    assert plan["point"].reason == "keep: ignored by the user"
    with pytest.raises(ModelError, match="matches no layer"):
        rankopt.search(planted_model(), "params<=90%", only=lambda layer: False)


@pytest.mark.parametrize("strategy", ["energy", "parameter_ratio", "vbmf", "knapsack"])
@pytest.mark.parametrize("rounding", ["down", "nearest", "up"])
def test_rounded_ranks_hold_the_budget(strategy, rounding):
    plan = rankopt.search(
        planted_model(),
        "macs<=60%",
        strategy=strategy,
        example_inputs=planted_inputs(),
        round_to=8,
        rounding=rounding,
    )
    assert plan.totals["macs"]["measured"] <= 0.6 * plan.totals["macs"]["before"]
    full = {16, 32, 48, 64, 10}
    ranks = [rank for decision in plan.changes for rank in decision.ranks]
    assert ranks
    assert all(rank % 8 == 0 or rank in full for rank in ranks)


def test_rounding_directions():
    def ranks(**arguments):
        plan = rankopt.search(
            nn.Sequential(nn.Linear(64, 64)), None, strategy="parameter_ratio", **arguments
        )
        return plan["0"].ranks

    assert ranks() == (16,)
    assert ranks(round_to=6) == (12,)
    assert ranks(round_to=6, rounding="up") == (18,)
    assert ranks(round_to=6, rounding="nearest") == (18,)
    assert ranks(round_to=100) == (16,)
    for bad in ({"round_to": 0}, {"round_to": 2.0}, {"rounding": "sideways"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ranks(**bad)


def test_progress_is_shown_as_asked_while_inputs_are_read(monkeypatch):
    asked = []

    def spied(label, total, *, enabled=None):
        asked.append(enabled)
        return progress_bar(label, total, enabled=False)

    monkeypatch.setattr("rankopt._calibration.collect.progress_bar", spied)
    for progress in (False, True, None):
        rankopt.search(
            planted_model(), "params<=60%", calibration=[planted_inputs()], progress=progress
        )
    assert asked == [False, True, None]


def test_a_log_has_a_line_of_each_bar(monkeypatch, capsys):
    monkeypatch.setattr("rankopt._utils.progress.PATIENCE_SECONDS", 0.0)
    with progress_bar("calibrating", 3, enabled=True) as advance:
        for _ in range(3):
            advance()
    shown = capsys.readouterr().err
    assert shown.count("calibrating") == 1
    assert "3/3" in shown


def test_the_deadline_holds_while_inputs_are_read():
    model, calls = planted_model(), []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    inputs = [planted_inputs()] * 8
    with pytest.raises(DeadlineExceeded):
        rankopt.search(model, "params<=60%", calibration=inputs, timeout=0.0)
    assert len(calls) < len(inputs)


def test_the_reason_that_keeps_most_parameters_is_named():
    small = [nn.Linear(2, 2) for _ in range(3)]  # where no rank saves anything
    ends = [nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 64)]
    with pytest.raises(BudgetInfeasible, match="mostly for this reason: ignored by the user"):
        rankopt.search(nn.Sequential(*small, *ends), "params<=1%", ignore=["5"])


def test_under_a_budget_on_macs_it_is_the_reason_that_keeps_most_macs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.body = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 1)
            self.head = nn.Linear(64, 512)  # more parameters, but run once

        def forward(self, x):
            return self.head(self.body(self.wide(x)).mean((2, 3)))

    with pytest.raises(BudgetInfeasible, match="mostly for this reason: .*only 3 input"):
        rankopt.search(Net(), "macs<=5%", example_inputs=torch.randn(1, 3, 32, 32), ignore=["head"])


def test_methods_that_were_not_asked_for_are_refused():
    class Stubborn(Strategy):
        name = "stubborn"

        def search(self, problem):
            plan = rankopt.search(model, "params<=90%", methods="tucker2")
            return dataclasses.replace(plan, strategy=self.describe(0))

    model = planted_model()
    with pytest.raises(PlanError, match="chose tucker2 for layer .*; asked for were svd"):
        rankopt.search(model, "params<=90%", strategy=Stubborn(), methods="svd")
