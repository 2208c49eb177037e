"""What an error in one layer costs the whole network: the estimates tried, side by side.

Run: python -m benchmarks.sensitivity [--networks resnet20 vgg vit] [--share 0.5 0.3].
Every row is the same allocation over the same options, weighed by another estimate;
accuracy is on training images that neither calibration nor training of the estimate saw,
and its difference is paired with the default's. Data as in `benchmarks.calibrated` and
`benchmarks.unseen`, whose networks are trained here first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rankopt
from benchmarks import cifar, unseen
from rankopt._build.skeletons import build_with_moments
from rankopt._model import measure, surgery
from rankopt._model.hooks import hooked
from rankopt._model.inputs import main_output, run
from rankopt._search.opening import Opened, open_problem
from rankopt._utils.tables import table, to_text
from rankopt.strategy import Option, allocation, decide
from rankopt_strategies import Knapsack

PROBES, ROUNDS, FLOOR = 256, 3, 1e-12
Menus = Sequence[Sequence[Option]]


@dataclass(frozen=True)
class Weighed(Knapsack):
    """The knapsack under given weights, one per site."""

    name: ClassVar[str] = "knapsack, weighed"
    weights: tuple[float, ...] = ()

    def _weights(self, problem: Any, menus: Menus) -> list[float]:
        return list(self.weights)


def equal(opened: Opened, menus: Menus) -> list[float]:
    """Whitened relative output errors, all sites alike."""
    return [1.0] * len(menus)


def measured(opened: Opened, menus: Menus, *, power: float = 1.0) -> list[float]:
    """Divergence of the outputs when one site alone is decomposed."""
    found = allocation.sensitivities(opened.problem, menus)
    assert found is not None
    return [value**power for value in found]


def block(opened: Opened, menus: Menus, *, power: float = 1.0) -> list[float]:
    """Relative error² of the output of the module a layer belongs to."""
    problem, view, found = opened.problem, opened.view, []
    inputs = problem.inputs[0]
    for site, options in zip(problem.sites, menus, strict=True):
        probe = allocation._probe(problem, site, options)
        if probe is None:
            found.append(1.0)
            continue
        parent = site.name.rpartition(".")[0]
        changed = build_with_moments(view, [decide(site, probe)], problem.moments).eval()
        before, after = (_output(model, parent, inputs) for model in (view, changed))
        moved = float((before - after).square().sum() / before.square().sum())
        found.append((max(moved, FLOOR) / float(probe.error or 1.0) ** 2) ** power)
    return found


def _output(model: nn.Module, name: str, inputs: Any) -> Tensor:
    """Output of a submodule; of the whole model where its parent is a plain container."""
    seen: list[Any] = []
    module = model.get_submodule(name)
    if isinstance(module, nn.Sequential):
        module = model
    handle = module.register_forward_hook(lambda m, a, output: seen.append(output))
    with hooked([handle]), torch.no_grad(), measure.evaluation(model):
        run(model, inputs)
    output = main_output(seen[0])
    assert isinstance(output, Tensor)
    return output


def fisher(opened: Opened, menus: Menus, *, power: float = 1.0) -> list[float]:
    """E‖∂ log p(y|x)/∂output‖² · E‖output‖², labels y drawn from the model itself."""
    problem = opened.problem
    assert problem.copy is not None
    model = problem.copy().eval()
    modules = dict(surgery.named_modules(model))
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            kept[name] = output

        return hook

    names = [layer.name for site in problem.sites for layer in site.layers]
    handles = (modules[name].register_forward_hook(keep(name)) for name in names)
    totals = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(0)
    with hooked(handles), torch.enable_grad():
        for inputs in problem.inputs:
            scores = main_output(run(model, inputs))
            drawn = torch.multinomial(scores.detach().softmax(1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(scores, drawn, reduction="sum").backward()
            for name, output in kept.items():
                assert output.grad is not None
                size = output.detach().square().sum()
                totals[name] += float(output.grad.square().sum() * size)
    return [
        max(sum(totals[layer.name] for layer in site.layers), FLOOR) ** power
        for site in problem.sites
    ]


def relinearised(opened: Opened, menus: Menus) -> list[float]:
    """Each site's share of the divergence measured anew around the plan, a few times over."""
    problem, weights = opened.problem, measured(opened, menus, power=0.5)
    assert problem.divergence is not None
    best: tuple[float, list[float]] = (math.inf, weights)
    for _ in range(ROUNDS + 1):
        options = _solve(opened, menus, weights)
        whole = problem.divergence(dict(enumerate(options)))
        if whole < best[0]:
            best = (whole, weights)
        marginal = []
        for i, (site, option) in enumerate(zip(problem.sites, options, strict=True)):
            others = {j: other for j, other in enumerate(options) if j != i}
            probe = option if not option.keeps else allocation._probe(problem, site, menus[i])
            if probe is None:
                marginal.append(weights[i])
                continue
            without = problem.divergence(others)
            with_it = whole if not option.keeps else problem.divergence({**others, i: probe})
            error = float(probe.error or 1.0) ** 2
            marginal.append(max(with_it - without, 0.02 * whole / len(options)) / error)
        # Half of the way, on a logarithmic scale: the model is only trusted near the plan.
        scale = sum(marginal) / sum(weights)
        weights = [math.sqrt(w * scale * m) for w, m in zip(weights, marginal, strict=True)]
    return best[1]


def _solve(opened: Opened, menus: Menus, weights: Sequence[float]) -> list[Option]:
    problem = opened.problem
    assert problem.budget is not None
    import numpy as np

    damages = [
        np.array([weight * allocation.damage(option) for option in options])
        for weight, options in zip(weights, menus, strict=True)
    ]
    found = allocation.choose(problem, menus, damages, problem.budget.ratios)
    assert found is not None
    return found[0]


RULES: dict[str, Callable[[Opened, Menus], list[float]]] = {
    "measured KL, square root (default)": partial(measured, power=0.5),
    "whitened output error": equal,
    "output error relative to the block": block,
    "the same, square root": partial(block, power=0.5),
    "measured KL": measured,
    "Fisher": fisher,
    "Fisher, square root": partial(fisher, power=0.5),
    "re-linearised around the plan": relinearised,
}


def rows(
    model: nn.Module, budget: str, data: Sequence[Tensor], held: tuple[Tensor, Tensor]
) -> list[list[str]]:
    """Accuracy on held-out images under every rule, plain weights first."""
    limits = rankopt.Budget.parse(budget)
    plain = rankopt.search(model, budget, example_inputs=data[0][:64])
    found = {"plain weight error": unseen.correct(_settled(model, plain, data), held)}
    with torch.no_grad(), measure.preserve_rng():
        opened = open_problem(model, limits, example_inputs=data[0][:64], calibration=data)
        problem = opened.problem
        problem.prepare()
        menus = [allocation.menu(problem, site) for site in problem.sites]
        for name, rule in RULES.items():
            strategy = Weighed(weights=tuple(rule(opened, menus)))
            plan = opened.finish(strategy.search(problem), seconds=0.0)
            small = rankopt.apply(model, plan, calibration=data)
            found[name] = unseen.correct(small, held)
        weighed = problem.with_factors(fisher=True)
        plan = opened.finish(Knapsack().search(weighed), seconds=0.0)
        small = rankopt.apply(model, plan, calibration=data)
        found["default, outputs weighed by Fisher"] = unseen.correct(small, held)
    base = found[next(iter(RULES))].double()
    made = []
    for name, right in found.items():
        difference = right.double() - base
        error = float(difference.std()) / math.sqrt(len(difference))
        made.append(
            [
                name,
                f"{100 * float(right.double().mean()):.2f}",
                f"{100 * float(difference.mean()):+.2f} ± {100 * error:.2f}",
            ]
        )
    return made


def _settled(model: nn.Module, plan: rankopt.RankPlan, data: Sequence[Tensor]) -> nn.Module:
    small = rankopt.apply(model, plan)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        rankopt.recalibrate(small, data)
    return small


def network(name: str) -> tuple[nn.Module, list[Tensor], tuple[Tensor, Tensor]]:
    """A trained network, calibration batches and held-out training images."""
    if name == "resnet20":
        data = cifar.images("train", 0, 103)[0][:1024]
        return cifar.resnet20(), list(data.split(128)), cifar.images("train", 1000, 300)
    torch.manual_seed(0)
    model = unseen.vgg() if name == "vgg" else unseen.ViT()
    x, y = unseen.images(unseen.FOLDER, "train")
    unseen.train(model, (x[:-5000], y[:-5000]), 2)
    return model, list(x[: unseen.CALIBRATION].split(128)), (x[-5000:], y[-5000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg", "vit"])
    parser.add_argument("--share", nargs="+", type=float, default=[0.5, 0.3])
    arguments = parser.parse_args()
    made = table(
        "knapsack under other sensitivities, held-out training images",
        "network", "budget", "weight of a site", "accuracy", "to the default",
    )  # fmt: skip
    for name in arguments.networks:
        model, data, held = network(name)
        for share in arguments.share:
            budget = f"macs<={share:g}, params<={share:g}"
            for cells in rows(model, budget, data, held):
                made.add_row(name, f"{100 * share:g}%", *cells)
                print(name, share, *cells, sep=" | ", flush=True)
    print(to_text(made))


if __name__ == "__main__":
    main()
