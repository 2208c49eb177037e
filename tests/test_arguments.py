"""What users give by mistake in place of a model, a plan or a strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import ModelError, PlanError, RegistryError, StudyError
from rankopt.testing import planted_model

NET = nn.Linear(8, 8)
BATCH_NORM = nn.BatchNorm1d(8)


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


@pytest.mark.parametrize("value", [3, 2.5, True])
def test_one_value_in_place_of_several(value):
    for name in ("only", "ignore"):
        with pytest.raises(ModelError, match=rf"^{name}={value}: expected a glob on module names"):
            rankopt.search(planted_model(), "params<=80%", **{name: value})
    with pytest.raises(RegistryError, match=rf"name or an instance of Decomposition, not {value}"):
        rankopt.search(planted_model(), "params<=80%", methods=value)
    with pytest.raises(ValueError, match=rf"^ranks={value}: expected a sequence"):
        rankopt.profile(NET, "", example_inputs=torch.zeros(1, 8), ranks=value)


@pytest.mark.parametrize("value", [2.5, "x", 0, True])
def test_numbers_of_samples(value):
    data, match = [torch.zeros(4, 8)], rf"^calibration_samples={value!r}: expected an integer"
    calls = [
        lambda: rankopt.search(NET, "params<=80%", calibration=data, calibration_samples=value),
        lambda: rankopt.recover(NET, teacher=NET, calibration=data, calibration_samples=value),
        lambda: rankopt.recalibrate(BATCH_NORM, data, max_samples=value),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("learning_rate", "x", "expected a positive number"),
        ("learning_rate", -1, "expected a positive number"),
        ("learning_rate", float("nan"), "expected a positive number"),
        ("seed", "x", "expected an integer of at least 0"),
        ("batch_size", 2.5, "expected an integer of at least 1"),
    ],
)
def test_settings_of_recover(setting, value, match):
    data = [torch.zeros(32, 8)]
    with pytest.raises(ValueError, match=rf"^{setting}={value!r}: {match}"):
        rankopt.recover(NET, teacher=NET, calibration=data, **{setting: value})
    with pytest.raises(ValueError, match=rf"^{setting}={value!r}: {match}"):
        rankopt.compress(NET, "params<=80%", calibration=data, recover={setting: value})


def test_teachers_of_recalibrate():
    with pytest.raises(ModelError, match="^teacher: expected a torch.nn.Module, got int"):
        rankopt.recalibrate(BATCH_NORM, [torch.zeros(4, 8)], teacher=3)


def test_example_inputs_without_a_sample():
    empty = torch.zeros(0, 8)
    for call in (
        lambda: rankopt.search(NET, "macs<=80%", example_inputs=empty),
        lambda: rankopt.compare(NET, NET, example_inputs={"input": empty}),
        lambda: rankopt.profile(NET, "", example_inputs=(empty,)),
        lambda: rankopt.soften(NET, "macs<=80%", example_inputs=empty),
    ):
        with pytest.raises(ModelError, match=r"tensor of shape \[0, 8\] holds no sample"):
            call()


@pytest.mark.parametrize("setting", ["name", "sizes", "objective", "warm_starts", "space"])
def test_settings_of_studies(setting):
    with pytest.raises(StudyError, match=rf"^{setting}="):
        rankopt.study(NET, evaluate=lambda m: 1.0, storage=None, **{setting: [{}]})


def test_layers_of_8_bit_floats_are_kept():
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    net[1].to(torch.float8_e4m3fn)
    plan = rankopt.search(net, "params<=80%")
    assert plan["1"].keeps
    assert "its weight is float8_e4m3fn, which cannot be decomposed" in plan["1"].reason
    small = rankopt.apply(net, plan)
    assert small[1].weight.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seed": "a"}, "seed='a': expected an integer of at least 0"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"progress": "x"}, "progress='x': expected True, False or None"),
    ],
)
def test_settings_of_a_search(settings, match):
    with pytest.raises(ValueError, match=match):
        rankopt.search(NET, "params<=50%", **settings)


def test_parameters_that_are_no_plain_tensors():
    class Quantised(torch.Tensor):  # as torchao makes them
        @staticmethod
        def __new__(cls, held):
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

        def __init__(self, held):
            self.held = held

        def __tensor_flatten__(self):
            return ["held"], None

        @staticmethod
        def __tensor_unflatten__(held, *_):
            return Quantised(held["held"])

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.detach.default:
                return cls(args[0].held)
            raise NotImplementedError(func)

    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(Quantised(torch.randn(8, 8)))
    with pytest.raises(ModelError, match="parameter 0.weight is a Quantised, not a plain tensor"):
        rankopt.search(model, "params<=50%")


def test_a_child_named_as_compiled_models_name_theirs():
    holder = nn.Sequential(nn.Linear(64, 64))
    holder._orig_mod = nn.Linear(8, 8)
    plan = rankopt.search(holder, "params<=60%")
    assert plan["0"].method == "svd"
