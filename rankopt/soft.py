"""Soft ranks for anyone's training loop: wrap, train with one more term, discretise."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt import measure, surgery
from rankopt._apply import build_with_moments, remember_plan
from rankopt._latency_budget import bounds_latency
from rankopt._search import Opened, check_request, open_problem
from rankopt.budget import Budget
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.projection import Projection, survival
from rankopt.errors import ModelError, NotYetSupported
from rankopt.inputs import MAX_SAMPLES
from rankopt.layers import Layer, Patterns, stored_weight
from rankopt.plan import RankPlan
from rankopt.relaxation import Menu, Relaxation, softmax
from rankopt.strategy import Problem, Strategy, Tags

__all__ = ["SoftModel", "soften"]

# Entropy of the first and of the last step, in shares of the uniform distribution's.
FIRST_ENTROPY: Final = 0.6
LAST_ENTROPY: Final = 0.02
# How fast the multipliers of budget and entropy rise, in losses per unit of excess.
STIFFNESS: Final = 4.0


def soften(
    model: nn.Module,
    budget: str | Budget,
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    methods: Sequence[str | Decomposition] = Strategy.methods,
    only: Patterns = (),
    ignore: Patterns = (),
    progress: bool | None = None,
) -> SoftModel:
    """A copy of `model` whose ranks are learned as it trains.

    Add `SoftModel.penalty` to the loss, train both `SoftModel.weights` and
    `SoftModel.logits` as usual, then `SoftModel.discretise` the ranks and
    `SoftModel.build` the small model.

    Args:
        model: A trained model; not changed.
        budget: As of `rankopt.search`.
        example_inputs: As of `rankopt.search`; needed for MACs.
        calibration: Inputs; ranks are then truncations that keep the layers' outputs.
        calibration_samples: Where to stop reading.
        methods: Decompositions to choose from that can mix ranks (`Decomposition.soft`).
        only: Layers to soften, as of `rankopt.search`.
        ignore: Layers to leave dense.
        progress: Whether to show progress bars.

    Raises:
        BudgetError: The budget cannot be read, or needs inputs not given.
        BudgetInfeasible: Even the smallest ranks exceed it.
        ModelError: No layer can be decomposed, or every weight is frozen.
        NotYetSupported: A budget on measured latency.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> soft = rankopt.soften(model, "params<=50%")
        >>> loss = soft(torch.randn(8, 32)).square().mean() + soft.penalty(0.0)
        >>> loss.backward()
        >>> plan = soft.discretise()
        >>> soft.build(plan)(torch.randn(8, 32)).shape
        torch.Size([8, 4])
    """
    started = time.perf_counter()
    allowed = Budget.parse(budget)
    check_request(allowed, _Trained(), example_inputs, calibration, None)
    if bounds_latency(allowed):
        raise NotYetSupported(
            f"budget {allowed}: soften() holds params, macs and memory; for a budget on measured "
            "latency use rankopt.search"
        )
    with torch.no_grad(), measure.preserve_rng():
        opened = open_problem(
            model,
            allowed,
            example_inputs=example_inputs,
            calibration=calibration,
            calibration_samples=calibration_samples,
            methods=methods,
            only=only,
            ignore=ignore,
            progress=progress,
        )
        opened.problem.prepare()
        trained = surgery.clone(opened.view)
        names = [site.name for site in opened.problem.sites]
        if not any(parameter.requires_grad for parameter in trained.parameters()):
            raise ModelError(
                "every parameter of the model is frozen (requires_grad=False); free those to "
                f"train, such as {names[0]}.weight, or use rankopt.search"
            )
        relaxation = Relaxation(opened.problem, soft=True)
        soft = SoftModel(trained, relaxation)
        soft.opened = opened
        scores = np.square(relaxation.error)
        temperature = float(np.ptp(scores)) or 1.0
        for _ in range(60):
            probabilities, _ = relaxation.priced(scores, temperature)
            if relaxation.entropy(probabilities).mean() <= FIRST_ENTROPY:
                break
            temperature *= 0.7
        soft.set_probabilities(probabilities)
        soft.seconds = time.perf_counter() - started
    return soft


@dataclass(frozen=True)
class _Trained(Strategy):
    """Stands in a plan for ranks that a training loop of the user's found."""

    name: ClassVar[str] = "soft"
    tags: ClassVar[Tags] = Tags(deterministic=False, monotone=False, unbudgeted=False)

    def search(self, problem: Problem) -> RankPlan:
        raise NotImplementedError("these ranks come from training a soft model")


class SoftModel(nn.Module):
    """A model whose layers compute with a mixture of ranks, held by one vector of logits.

    Each weight is the mean of the options' weights under their probabilities: of
    all truncations of one basis, which costs one product with gated directions
    and not one copy per rank. The weights stay the model's own parameters, so they
    train as usual, seen through the gates.

    Args:
        model: Unpacked, on its device; used, not copied.
        relaxation: The options of its sites.
    """

    owner: Tensor
    shares: Tensor
    room: Tensor
    log_sizes: Tensor
    multipliers: Tensor

    def __init__(self, model: nn.Module, relaxation: Relaxation) -> None:
        super().__init__()
        self.model, self.relaxation = model, relaxation
        device = surgery.device_of(model)
        self.scores = nn.Parameter(torch.zeros(len(relaxation), device=device))
        held = {
            "owner": torch.from_numpy(relaxation.owner),
            "shares": torch.from_numpy(relaxation.shares).float(),
            "room": torch.from_numpy(relaxation.room).float(),
            "log_sizes": torch.from_numpy(relaxation.sizes).clamp_min(2).log(),
            # Multipliers of the budget's axes and of the entropy.
            "multipliers": torch.zeros(len(relaxation.axes) + 1),
        }
        for name, value in held.items():
            self.register_buffer(name, value.to(device), persistent=name == "multipliers")
        self.sizes = [len(menu) for menu in relaxation.menus]
        self.sites = nn.ModuleList(_SoftSite(model, relaxation, m) for m in relaxation.menus)
        self.opened: Opened | None = None
        self.seconds = 0.0
        self._set: Tensor | None = None

    # Training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with its soft weights."""
        return torch.func.functional_call(self.model, self.soft_weights(), args, kwargs)

    def weights(self) -> list[nn.Parameter]:
        """The model's own parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def logits(self) -> list[nn.Parameter]:
        """The parameters of the ranks; a learning rate near 0.05 with Adam suits them."""
        return [self.scores]

    def penalty(self, progress: float) -> Tensor:
        """What to add to the loss: budget and entropy, by augmented Lagrangian.

        In train mode each call raises or lowers the multipliers by what is still
        exceeded, so that no weight needs tuning.

        Args:
            progress: Share of the training done, 0 to 1; the ranks are sure at 1.

        Returns:
            A scalar; its gradient reaches the logits alone.

        Raises:
            ValueError: `progress` outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress!r}: expected a share of the training, 0 to 1")
        probabilities = self.probabilities()
        target = FIRST_ENTROPY ** (1 - progress) * LAST_ENTROPY**progress
        excess = torch.cat(
            [
                probabilities @ self.shares - self.room,
                (self.entropy(probabilities) - target)[None],
            ]
        )
        raised = torch.relu(self.multipliers + STIFFNESS * excess)
        loss = (raised.square() - self.multipliers.square()).sum() / (2 * STIFFNESS)
        if self.training:
            self.multipliers.copy_(raised.detach())
        return loss

    # The state of the ranks

    def probabilities(self) -> Tensor:
        """[options] a distribution per site, from the logits or as set by `using`."""
        if self._set is not None:
            return self._set
        return softmax(self.scores, self.owner, len(self.sites))

    def set_probabilities(self, probabilities: npt.NDArray[np.float64]) -> None:
        """Give the logits the distributions [options]."""
        logs = np.log(np.maximum(probabilities, 1e-12))
        with torch.no_grad():
            self.scores.copy_(torch.from_numpy(logs))

    @contextmanager
    def using(self, probabilities: Tensor) -> Iterator[None]:
        """Compute with these probabilities [options] instead of the logits'."""
        before, self._set = self._set, probabilities
        try:
            yield
        finally:
            self._set = before

    def entropy(self, probabilities: Tensor) -> Tensor:
        """Mean entropy of the sites, as a share of the uniform distribution's."""
        terms = -probabilities * probabilities.clamp_min(1e-30).log()
        nats = torch.zeros_like(self.log_sizes).to(terms).index_add(0, self.owner, terms)
        share: Tensor = (nats / self.log_sizes).mean()
        return share

    def expected_cost(self) -> dict[str, float]:
        """Axis to the expected figure of the whole model, as a share of the budget's bound."""
        with torch.no_grad():
            used = self.probabilities() @ self.shares + 1 - self.room
        return dict(zip(self.relaxation.axes, used.tolist(), strict=True))

    def soft_weights(self) -> dict[str, Tensor]:
        """Parameter name in the model to its soft weight, as stored."""
        named: dict[str, Tensor] = {}
        # Autocast would project the weights in half precision.
        with torch.autocast(self.scores.device.type, enabled=False):
            parts = self.probabilities().split(self.sizes)
            for site, part in zip(self.sites, parts, strict=True):
                named.update(site(self.model, part))
        return named

    # Results

    def discretise(self) -> RankPlan:
        """The plan of the most probable ranks within the budget.

        Costs are those of the built model and within the budget; the errors it
        states are those of the weights `soften` was given.

        Raises:
            ModelError: The logits are not finite: the training diverged.
        """
        opened, relaxation = self.opened, self.relaxation
        assert opened is not None, "made by soften()"
        scores = self.scores.detach().double().cpu().numpy()
        if not np.isfinite(scores).all():
            bad = relaxation.owner[~np.isfinite(scores)][0]
            raise ModelError(
                f"layer {relaxation.menus[bad].site.name}: its rank logits are not finite, the "
                "training diverged; lower the learning rate or clip the gradients"
            )
        logs = np.log(np.maximum(relaxation.softmax(scores), 1e-300))
        prices = self.multipliers[:-1].double().cpu().numpy()
        chosen = relaxation.round(logs, np.square(relaxation.error), prices)
        with torch.no_grad(), measure.preserve_rng():
            options = relaxation.options(chosen)
            return opened.finish(opened.problem.plan(_Trained(), options), seconds=self.seconds)

    def build(self, plan: RankPlan) -> nn.Module:
        """The small model, with the weights as trained.

        Args:
            plan: From `discretise`.

        Returns:
            A new model of plain layers, as `rankopt.apply` makes; it computes what this
            one does with the plan's ranks.
        """
        opened = self.opened
        assert opened is not None, "made by soften()"
        with torch.no_grad(), measure.preserve_rng():
            with self.using(self._certain(plan)):
                projected = self.soft_weights()
            dense = surgery.clone(self.model)
            parameters = dict(dense.named_parameters(remove_duplicate=False))
            for name, value in projected.items():
                parameters[name].copy_(value)
            # The weights have the ranks of the plan now: any factors of those are exact.
            built = surgery.clone(build_with_moments(dense, plan.changes, {}))
        remember_plan(built, plan)
        return built

    def _certain(self, plan: RankPlan) -> Tensor:
        """[options] one for each site's option in the plan."""
        sure = torch.zeros_like(self.scores)
        for menu, start in zip(self.relaxation.menus, self.relaxation.starts, strict=True):
            decision = plan[menu.site.name]
            wanted = (None if decision.keeps else decision.method, decision.ranks)
            named = [(None if m is None else m.name, r) for m, r in
                     zip(menu.methods, menu.ranks, strict=True)]  # fmt: skip
            if wanted not in named:
                raise ModelError(
                    f"layer {menu.site.name}: {decision.method} at ranks {list(decision.ranks)} is "
                    "no option of this soft model; build the plan that discretise() gave"
                )
            sure[int(start) + named.index(wanted)] = 1.0
        return sure


class _SoftSite(nn.Module):
    """The options of one site as a function from probabilities to a weight."""

    def __init__(self, model: nn.Module, relaxation: Relaxation, menu: Menu) -> None:
        super().__init__()
        self.layers = menu.site.layers
        self.truncations = nn.ModuleList()
        problem = relaxation.problem
        for method in menu.site.methods:
            places = [i for i, found in enumerate(menu.methods) if found is method]
            if not places:
                continue
            basis = problem.basis(menu.site, method)
            ranks = np.array([menu.ranks[i] for i in places])
            maxima = [axis.maximum for axis in method.rank_axes(menu.site.layer)]
            self.truncations.append(_Truncations(basis.projection(), places, ranks, maxima))
        self.dense = menu.methods.index(None) if None in menu.methods else None

    def forward(self, model: nn.Module, probabilities: Tensor) -> dict[str, Tensor]:
        module: Any = model.get_submodule(self.layers[0].name)
        dense = _canonical(self.layers[0], module.weight)
        mixed = torch.zeros_like(dense)
        if self.dense is not None:
            mixed = probabilities[self.dense].to(dense.dtype) * dense
        for truncation in self.truncations:
            mixed = mixed + truncation(dense, probabilities)
        stored = stored_weight(self.layers[0], mixed)
        return {f"{layer.name}.weight" if layer.name else "weight": stored for layer in self.layers}


class _Truncations(nn.Module):
    """Some options of a site that truncate one basis."""

    places: Tensor
    cells: Tensor

    def __init__(
        self,
        projection: Projection,
        places: list[int],
        ranks: npt.NDArray[np.int64],
        maxima: list[int],
    ) -> None:
        super().__init__()
        self.projection = projection
        # No option has a rank beyond these, so nothing beyond is ever open.
        self.maxima = tuple(maxima)
        flat = np.ravel_multi_index(tuple((ranks - 1).T), self.maxima)
        device = next(projection.buffers()).device
        self.register_buffer("places", torch.tensor(places).to(device), persistent=False)
        self.register_buffer("cells", torch.from_numpy(flat).to(device), persistent=False)

    def forward(self, weight: Tensor, probabilities: Tensor) -> Tensor:
        mass = probabilities.new_zeros(math.prod(self.maxima))
        mass = mass.index_add(0, self.cells, probabilities[self.places])
        soft: Tensor = self.projection(weight, survival(mass.reshape(self.maxima)))
        return soft


def _canonical(layer: Layer, weight: Tensor) -> Tensor:
    """`rankopt.layers.canonical_weight`, differentiable."""
    grouped: Tensor = (weight.T if layer.transposed else weight).unflatten(0, (layer.groups, -1))
    return grouped
