"""What users give by mistake in place of a model, a plan or a strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import ModelError, PlanError, RegistryError
from rankopt.testing import planted_model

NET = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("resnet18", r"got str 'resnet18'; build the model"),
        (Path("d.pt"), r"got PosixPath 'd.pt'; build the model"),
        (NET.state_dict(), "got OrderedDict; a state dict holds no layers"),
        (None, "got NoneType; build the model first"),
        (nn.Linear, r"got the class Linear; make one, such as Linear\(...\)"),
    ],
)
def test_no_model(model, match):
    calls = [
        lambda: rankopt.search(model, "params<=50%"),
        lambda: rankopt.search(model, "params<=50%", calibration=[torch.zeros(1, 8)]),
        lambda: rankopt.apply(model, rankopt.RankPlan({}, ())),
        lambda: rankopt.apply_(model, rankopt.RankPlan({}, ())),
        lambda: rankopt.compress(model, "params<=50%", calibration=[torch.zeros(1, 8)]),
        lambda: rankopt.finetune(model, []),
        lambda: rankopt.fold(model, NET),
        lambda: rankopt.load(model, "d.safetensors"),
        lambda: rankopt.merge(model),
        lambda: rankopt.profile(model, "0", example_inputs=torch.zeros(1, 8)),
        lambda: rankopt.recalibrate(model, [torch.zeros(1, 8)]),
        lambda: rankopt.recover(model, teacher=NET, calibration=[torch.zeros(1, 8)]),
        lambda: rankopt.save(model, "d.safetensors"),
        lambda: rankopt.soften(model, "params<=50%"),
        lambda: rankopt.study(model, evaluate=lambda m: 1.0, storage=None),
    ]
    for call in calls:
        with pytest.raises(ModelError, match="^model: expected.*" + match):
            call()


def test_other_models_are_named():
    with pytest.raises(ModelError, match="^original: expected a torch.nn.Module, got str"):
        rankopt.compare("a", NET)
    with pytest.raises(ModelError, match="^compressed: expected a torch.nn.Module, got NoneType"):
        rankopt.compare(NET, None)
    with pytest.raises(ModelError, match="^teacher: expected a torch.nn.Module, got dict"):
        rankopt.finetune(NET, [], teacher={})
    with pytest.raises(ModelError, match="^teacher: expected a torch.nn.Module, got NoneType"):
        rankopt.recover(NET, teacher=None, calibration=[torch.zeros(1, 8)])


def test_arguments_in_the_other_order():
    plan = rankopt.RankPlan({}, ())
    for call in (
        lambda: rankopt.apply(plan, NET),
        lambda: rankopt.load("d.safetensors", NET),
        lambda: rankopt.save("d.safetensors", NET),
        lambda: rankopt.finetune([], NET),
    ):
        with pytest.raises(ModelError, match="other order, the model comes first"):
            call()


def test_no_plan():
    for plan, match in (
        ("plan.json", r"got str; read the file first: rankopt.RankPlan.load\('plan.json'\)"),
        (None, "got NoneType; make one with rankopt.search"),
    ):
        for function in (rankopt.apply, rankopt.apply_):
            with pytest.raises(PlanError, match="plan: expected a rankopt.RankPlan, " + match):
                function(NET, plan)


def test_a_class_in_place_of_a_strategy():
    cls = rankopt.strategies.get("knapsack")
    with pytest.raises(RegistryError, match=r"Knapsack is the class of a strategy.*Knapsack\(\)"):
        rankopt.search(planted_model(), "params<=50%", strategy=cls)
    svd = rankopt.decompositions.get("svd")
    with pytest.raises(RegistryError, match=r"SVD is the class of a decomposition.*SVD\(\)"):
        rankopt.search(planted_model(), "params<=50%", methods=[svd])


def test_one_method_needs_no_list():
    for methods in ("svd", rankopt.decompositions.create("svd")):
        plan = rankopt.search(planted_model(), "params<=80%", methods=methods)
        assert {decision.method for decision in plan.changes} == {"svd"}
    with pytest.raises(RegistryError, match="unknown decomposition 'tukcer2'"):
        rankopt.search(planted_model(), "params<=80%", methods="tukcer2")
