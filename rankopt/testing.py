"""The contracts, as importable tests for built-in and third-party plug-ins.

```python
from rankopt.testing import check_strategy, strategy_checks

def test_mine():
    check_strategy(MyStrategy())

@pytest.mark.parametrize("check", strategy_checks(MyStrategy()), ids=str)
def test_each(check):
    check()
```
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import rankopt
from rankopt import measure
from rankopt._modelled_clock import ModelledClock, Operations
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.projection import survival
from rankopt.decompositions.rebuild import rebuild
from rankopt.errors import BudgetInfeasible, DeadlineExceeded, RankoptError
from rankopt.layers import Layer, canonical_weight, find_layers
from rankopt.plan import Decision, RankPlan
from rankopt.profile_table import ProfileTable
from rankopt.registry import strategies
from rankopt.strategy import Strategy, Tags

__all__ = [
    "Check",
    "ModelledClock",
    "Operations",
    "check_decomposition",
    "check_strategy",
    "decomposition_checks",
    "planted_model",
    "strategy_checks",
]

# Rounding of a float32 forward pass through a few layers, relative.
FLOAT32_OUTPUT: Final = 2e-4
# Rounding of Gram-based errors in float64: square roots of 1e-16 relative energies.
FLOAT64_ERROR: Final = 1e-6
# Errors found by subtracting energies, whose square is exact to rounding.
FITTED_ERROR: Final = 1e-5
# Truncations through projections in the weight's own precision, float32.
SOFT_ERROR: Final = 1e-5
INPUT_SIZE: Final = 12


@dataclass(frozen=True)
class Check:
    """One named check; call it to run it."""

    subject: str
    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        try:
            self.run()
        except AssertionError as error:
            raise AssertionError(f"{self.subject}: {self.name}: {error}") from error

    def __str__(self) -> str:
        return f"{self.subject}-{self.name}"


class _Planted(nn.Module):
    """Convolutions, a grouped one, a strided 1x1, linear layers, kept layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 48, 1, stride=2)
        self.hidden = nn.Linear(48, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(torch.relu(self.stem(x)))))
        x = torch.relu(self.point(self.depthwise(torch.relu(self.grouped(x)))))
        out: Tensor = self.head(torch.relu(self.hidden(x.mean(dim=(2, 3)))))
        return out


def planted_model(seed: int = 0, *, rank: int = 4, noise: float = 0.1) -> nn.Module:
    """A small network whose weights are low rank plus noise, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with measure.preserve_rng():
        torch.manual_seed(seed)
        model = _Planted()
    for layer in find_layers(model):
        if layer.refusal is not None:
            continue
        for group in canonical_weight(model.get_submodule(layer.name)):
            out, rest = len(group), group[0].numel()
            signal = torch.randn(out, rank, generator=generator) @ torch.randn(
                rank, rest, generator=generator
            )
            mixed = signal / math.sqrt(rank) + noise * torch.randn(out, rest, generator=generator)
            group.copy_((mixed / math.sqrt(rest)).reshape(group.shape))
    return model.eval()


def planted_inputs(batch: int = 2) -> Tensor:
    """Example inputs for `planted_model`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, INPUT_SIZE, INPUT_SIZE, generator=generator)


# Strategies


def check_strategy(strategy: Strategy | str, **search_arguments: Any) -> None:
    """Run every check of the strategy contract; AssertionError names the first to fail.

    Args:
        strategy: An instance, or a registered name.
        search_arguments: Passed on to every `rankopt.search`, such as `calibration=`.
    """
    for check in strategy_checks(strategy, **search_arguments):
        check()


def strategy_checks(strategy: Strategy | str, **search_arguments: Any) -> list[Check]:
    """The checks that apply to a strategy, by its tags."""
    made = strategies.create(strategy)
    suite = _StrategySuite(made, search_arguments)
    checks = [
        suite.has_name_and_tags,
        suite.settings_are_frozen,
        suite.meets_budgets,
        suite.refuses_infeasible_budgets,
        suite.leaves_the_model_alone,
        suite.leaves_generators_alone,
        suite.chooses_feasible_ranks,
        suite.leaves_ignored_layers,
        suite.plan_round_trips,
        suite.plan_applies,
        suite.stops_at_the_deadline,
        suite.survives_interrupts,
    ]
    if made.tags.deterministic:
        checks.append(suite.is_deterministic)
    if made.tags.monotone:
        checks.append(suite.is_monotone)
    if made.tags.unbudgeted:
        checks.append(suite.answers_without_a_budget)
    return [Check(made.name, check.__name__, check) for check in checks]


class _StrategySuite:
    BUDGETS: Final = ("params<=60%", "macs<=50%", "memory<=70%, macs<=60%")

    def __init__(self, strategy: Strategy, arguments: dict[str, Any]) -> None:
        self.strategy, self.arguments = strategy, arguments
        self.timed = "latency" in strategy.tags.needs
        if self.timed:  # decisions are compared, so times must not vary
            table = ProfileTable(clock=ModelledClock(), rounds=3)
            self.arguments = {"profile": table, **arguments}

    def plan(self, budget: str | None, model: nn.Module | None = None, **more: Any) -> RankPlan:
        return rankopt.search(
            planted_model() if model is None else model,
            budget,
            strategy=self.strategy,
            **{"example_inputs": planted_inputs(), **self.arguments, **more},
        )

    def has_name_and_tags(self) -> None:
        assert isinstance(self.strategy.name, str) and self.strategy.name, "name is no text"
        assert isinstance(self.strategy.tags, Tags), "tags is no rankopt.Tags"
        known = {"calibration", "evaluate", "latency"}
        assert self.strategy.tags.needs <= known, f"needs beyond {sorted(known)}"

    def settings_are_frozen(self) -> None:
        assert dataclasses.is_dataclass(self.strategy), "not a dataclass"
        parameters = type(self.strategy).__dataclass_params__
        assert parameters.frozen, "the dataclass is not frozen"

    def meets_budgets(self) -> None:
        for budget in self.BUDGETS:
            plan = self.plan(budget)
            assert plan.budget is not None
            for axis in plan.budget.axes:
                entry = plan.totals[axis]
                assert entry["measured"] == entry["predicted"], f"{axis} misjudged under {budget}"
                share = float(entry["measured"] or 0) / float(entry["before"] or 1)
                assert share <= plan.budget.ratio(axis), f"{budget}: {axis} is {share:.4f}"

    def refuses_infeasible_budgets(self) -> None:
        try:
            self.plan("macs<=0.1%")
        except BudgetInfeasible as error:
            assert 0.001 < error.smallest["macs"] <= 1, f"smallest is {error.smallest}"
        else:
            raise AssertionError("a budget of 0.1% of the MACs was accepted")

    def leaves_the_model_alone(self) -> None:
        model = planted_model()
        model.train()
        model.get_submodule("norm").eval()
        model.get_submodule("head").weight.requires_grad_(False)
        before = _snapshot(model)
        # Without a run the weights are shared.
        for inputs in (planted_inputs(), *(() if self.timed else (None,))):
            self.plan(self.BUDGETS[0], model, example_inputs=inputs)
            assert _snapshot(model) == before, "weights, buffers, modes, hooks or flags changed"

    def leaves_generators_alone(self) -> None:
        model = planted_model()
        before = _generators()
        self.plan(self.BUDGETS[0], model)
        assert _generators() == before, "a global random generator moved"

    def chooses_feasible_ranks(self) -> None:
        model = planted_model()
        layers = {layer.name: layer for layer in find_layers(model)}
        for decision in self.plan(self.BUDGETS[1], model).changes:
            settings = {key: value for key, value in decision.args.items() if key != "ranks"}
            method = rankopt.decompositions.create(decision.method, **settings)
            method.check_ranks(layers[decision.targets[0]], decision.ranks)

    def leaves_ignored_layers(self) -> None:
        plan = self.plan("params<=90%", ignore=["hid*"])
        assert plan["hidden"].keeps, "an ignored layer was decomposed"

    def plan_round_trips(self) -> None:
        plan = self.plan(self.BUDGETS[0])
        assert RankPlan.from_json(plan.to_json()) == plan, "JSON does not give the plan back"

    def plan_applies(self) -> None:
        model = planted_model()
        plan = self.plan(self.BUDGETS[0], model)
        small = rankopt.apply(model, plan, **_sources(self.arguments, plan))
        assert measure.count_params(small) == plan.totals["params"]["measured"]
        with torch.no_grad():
            assert small(planted_inputs()).isfinite().all(), "outputs are not finite"

    def stops_at_the_deadline(self) -> None:
        try:
            self.plan(self.BUDGETS[0], timeout=0.0)
        except DeadlineExceeded:
            return

    def survives_interrupts(self) -> None:
        model = planted_model()
        before = _snapshot(model)

        class Interrupting(type(self.strategy)):  # type: ignore[misc]
            def search(self, problem: Any) -> RankPlan:
                super().search(problem)
                raise KeyboardInterrupt

        values = {f.name: getattr(self.strategy, f.name) for f in dataclasses.fields(self.strategy)}  # type: ignore[arg-type]
        interrupting = Interrupting(**values)
        try:
            rankopt.search(
                model,
                self.BUDGETS[0],
                strategy=interrupting,
                **{"example_inputs": planted_inputs(), **self.arguments},
            )
        except KeyboardInterrupt:
            assert _snapshot(model) == before, "an interrupt left the model changed"
        else:
            raise AssertionError("KeyboardInterrupt was swallowed")

    def is_deterministic(self) -> None:
        first, second = self.plan(self.BUDGETS[1]), self.plan(self.BUDGETS[1])
        assert first.decisions == second.decisions, "the same seed gave other decisions"

    def is_monotone(self) -> None:
        errors = []
        for share in (40, 50, 65, 80):
            model = planted_model()
            plan = self.plan(f"params<={share}%", model)
            errors.append(sum(_squared_error(model, decision) for decision in plan.changes))
        pairs = itertools.pairwise(errors)
        assert all(b <= a + FLOAT64_ERROR for a, b in pairs), f"errors by budget: {errors}"

    def answers_without_a_budget(self) -> None:
        plan = self.plan(None)
        assert plan.budget is None
        assert plan.changes, "nothing was decomposed"


def _squared_error(model: nn.Module, decision: Decision) -> float:
    """‖W − Ŵ‖² / ‖W‖² of one decision, whatever the plan says of it."""
    settings = {key: value for key, value in decision.args.items() if key != "ranks"}
    method = rankopt.decompositions.create(decision.method, **settings)
    weight = canonical_weight(model.get_submodule(decision.targets[0]))
    return float(method.prepare(weight).error(decision.ranks)) ** 2


def _sources(arguments: dict[str, Any], plan: RankPlan) -> dict[str, Any]:
    needs = any(decision.factors.kind != "weights" for decision in plan)
    return {"calibration": arguments["calibration"]} if needs else {}


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": measure.weights_digest(model),
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad is None for parameter in model.parameters()],
        "identity": [id(parameter) for parameter in model.parameters()],
    }


def _generators() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # type: ignore[index]
    )


# Decompositions


def check_decomposition(decomposition: Decomposition, modules: Sequence[nn.Module]) -> None:
    """Run every check of the decomposition contract on each module.

    Args:
        decomposition: The method, with settings.
        modules: Layers it applies to.
    """
    for check in decomposition_checks(decomposition, modules):
        check()


def decomposition_checks(decomposition: Decomposition, modules: Sequence[nn.Module]) -> list[Check]:
    """The checks of a decomposition, one set per module."""
    made = []
    for index, module in enumerate(modules):
        suite = _DecompositionSuite(decomposition, module)
        made += [
            Check(f"{decomposition.name}[{index}]", check.__name__, check)
            for check in suite.checks()
        ]
    return made


class _DecompositionSuite:
    def __init__(self, decomposition: Decomposition, module: nn.Module) -> None:
        self.method = decomposition
        self.model = nn.Sequential(module)
        (self.layer,) = find_layers(self.model)
        self.weight = canonical_weight(module)

    def checks(self) -> Iterator[Callable[[], None]]:
        yield self.applies
        yield self.costs_are_those_of_the_chain
        yield self.infeasible_ranks_are_refused
        if self.method.exact_error:
            yield self.error_is_what_was_lost
            yield self.error_falls_with_rank
            yield self.full_rank_is_exact
        else:
            yield self.fitted_error_is_what_was_lost
            yield self.estimates_are_errors
        if self.method.soft:
            yield self.mixes_ranks

    @property
    def full(self) -> list[int]:
        return [axis.maximum for axis in self.method.rank_axes(self.layer)]

    def applies(self) -> None:
        assert self.method.applies(self.layer), self.method.refusal(self.layer)

    def rank_choices(self) -> Iterator[tuple[int, ...]]:
        axes = self.method.rank_axes(self.layer)
        yield tuple(axis.step for axis in axes)
        yield tuple(max(1, axis.maximum // 2 // axis.step) * axis.step for axis in axes)
        yield tuple(self.full)

    def costs_are_those_of_the_chain(self) -> None:
        for ranks in self.rank_choices():
            built = self.method.build(self.layer, ranks)
            weights = sum(p.numel() for n, p in built.named_parameters() if n.endswith("weight"))
            assert self.method.params(self.layer, ranks) == weights, f"params at ranks {ranks}"
            shapes = {n: p.shape for n, p in built.named_parameters() if n.endswith("weight")}
            factors = self.method.prepare(self.weight).factors(ranks)
            found = {name: value.shape for name, value in factors.items()}
            assert found == shapes, f"factors at {ranks} have shapes {found}, modules {shapes}"
            assert set(dict(built.named_children())) <= set(self.method.roles), "roles"

    def infeasible_ranks_are_refused(self) -> None:
        for ranks in ([0] * len(self.full), [n + 1 for n in self.full], [1] * (len(self.full) + 1)):
            try:
                self.method.check_ranks(self.layer, ranks)
            except RankoptError:
                continue
            raise AssertionError(f"ranks {ranks} were accepted")

    def reconstruction(self, ranks: Sequence[int]) -> Tensor:
        """The dense weight the factors stand for, from impulses through the chain."""
        return dense_weight(self.method, self.layer, self.weight, ranks)

    def error_is_what_was_lost(self) -> None:
        basis = self.method.prepare(self.weight)
        exact = self.weight.to(torch.float64)
        for ranks in self.rank_choices():
            lost = (exact - self.reconstruction(ranks)).norm() / exact.norm()
            stated = float(basis.error(ranks))
            # Factors may be refined beyond the nested truncation the error is stated
            # for, never the other way; with a single rank both are the same.
            assert lost <= stated + FLOAT64_ERROR, f"ranks {ranks}: lost {lost}, stated {stated}"
            if len(ranks) == 1:
                assert lost >= stated - FLOAT64_ERROR, f"ranks {ranks}: stated {stated} > {lost}"

    def fitted_error_is_what_was_lost(self) -> None:
        basis = self.method.prepare(self.weight)
        exact = self.weight.to(torch.float64)
        for ranks in self.rank_choices():
            lost = float((exact - self.reconstruction(ranks)).norm() / exact.norm())
            stated = basis.fitted_error(ranks)
            assert abs(lost - stated) <= FITTED_ERROR, f"ranks {ranks}: lost {lost}, not {stated}"

    def estimates_are_errors(self) -> None:
        axes = self.method.rank_axes(self.layer)
        choices = [np.arange(axis.step, axis.maximum + 1, axis.step) for axis in axes]
        grids = np.meshgrid(*choices, indexing="ij")
        errors = np.asarray(self.method.prepare(self.weight).error(grids))
        assert errors.shape == grids[0].shape
        assert ((errors >= 0) & (errors <= 1)).all(), "relative errors lie in [0, 1]"

    def error_falls_with_rank(self) -> None:
        basis = self.method.prepare(self.weight)
        grids = np.meshgrid(*(np.arange(1, n + 1) for n in self.full), indexing="ij")
        errors = np.asarray(basis.error(grids))
        for axis in range(errors.ndim):
            assert (np.diff(errors, axis=axis) <= FLOAT64_ERROR).all(), f"axis {axis}"

    def mixes_ranks(self) -> None:
        basis, exact = self.method.prepare(self.weight), self.weight.to(torch.float64)
        project = basis.projection().double()
        for ranks in self.rank_choices():
            mass = torch.zeros(self.full, dtype=torch.float64)
            mass[tuple(rank - 1 for rank in ranks)] = 1.0
            soft = project(exact, survival(mass))
            error = float((exact - soft).norm() / exact.norm())
            stated = float(basis.error(ranks))
            assert abs(error - stated) <= SOFT_ERROR, f"{ranks}: {error}, stated {stated}"

    def full_rank_is_exact(self) -> None:
        exact = self.weight.to(torch.float64)
        error = (exact - self.reconstruction(self.full)).norm() / exact.norm()
        assert error <= FLOAT64_ERROR, f"relative error {error} at full rank"


def dense_weight(
    method: Decomposition, layer: Layer, weight: Tensor, ranks: Sequence[int]
) -> Tensor:
    """The canonical weight that a chain's factors multiply out to, in float64."""
    factors = method.prepare(weight).factors(ranks)
    return rebuild(method, layer, ranks, {name: f.double() for name, f in factors.items()})
