"""A model whose layers compute with a mixture of ranks, and what its training loop found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt._build.provenance import remember_plan
from rankopt._build.skeletons import build_with_factors
from rankopt._decompositions.base import made_by
from rankopt._model import measure, surgery
from rankopt._search.latency_budget import solve
from rankopt._search.model_clock import ModelClock
from rankopt._search.opening import Opened
from rankopt._soft.weights import SoftSite
from rankopt.budget import Budget
from rankopt.errors import ModelError
from rankopt.plan import Factors, RankPlan
from rankopt.strategy import Option, Problem, Strategy, Tags
from rankopt.strategy.relaxation import Relaxation, softmax

__all__ = ["FIRST_ENTROPY", "SoftModel", "Trained"]

# Entropy of the first and of the last step, in shares of the uniform distribution's.
FIRST_ENTROPY: Final = 0.6
LAST_ENTROPY: Final = 0.02
# How fast the multipliers of budget and entropy rise, in losses per unit of excess.
STIFFNESS: Final = 4.0


@dataclass(frozen=True)
class Trained(Strategy):
    """Ranks that a training loop of the user's found, rounded to the budget at hand."""

    name: ClassVar[str] = "soft"
    tags: ClassVar[Tags] = Tags(deterministic=False, monotone=False, unbudgeted=False)
    soft: SoftModel | None = field(default=None, repr=False, compare=False)

    def describe(self, seed: int) -> dict[str, Any]:
        """No settings: the training loop had them."""
        return {"name": self.name, "settings": {}, "seed": seed}

    def search(self, problem: Problem) -> RankPlan:
        """Round the logits; see `Strategy.search`."""
        assert self.soft is not None
        return problem.plan(self, self.soft.rounded(problem))


class SoftModel(nn.Module):
    """A model whose layers compute with a mixture of ranks, held by one vector of logits.

    Each weight is the mean of the options' weights under their probabilities: of
    all truncations of one basis, which costs one product with gated directions
    and not one copy per rank. The weights stay the model's own parameters, so they
    train as usual, seen through the gates.

    Args:
        model: Unpacked, on its device; used, not copied.
        relaxation: The options of its sites.
        frozen: Whether its weights never change; see `SoftSite`.
    """

    owner: Tensor
    shares: Tensor
    room: Tensor
    log_sizes: Tensor
    multipliers: Tensor
    settled: Tensor

    def __init__(self, model: nn.Module, relaxation: Relaxation, *, frozen: bool = False) -> None:
        super().__init__()
        self.model, self.relaxation = model, relaxation
        device = surgery.device_of(model)
        self.scores = nn.Parameter(torch.zeros(len(relaxation), device=device, dtype=torch.float32))
        held = {
            "owner": torch.from_numpy(relaxation.owner),
            "shares": torch.from_numpy(relaxation.shares).float(),
            "room": torch.from_numpy(relaxation.room).float(),
            "log_sizes": torch.from_numpy(relaxation.sizes).clamp_min(2).log(),
            # Multipliers of the budget's axes and of the entropy.
            "multipliers": torch.zeros(len(relaxation.axes) + 1, dtype=torch.float32),
            # Of `settle`; zeros before.
            "settled": torch.zeros(len(relaxation), dtype=torch.float32),
        }
        for name, value in held.items():
            state = name in ("multipliers", "settled")
            self.register_buffer(name, value.to(device), persistent=state)
        self.register_load_state_dict_post_hook(_settled_as_loaded)  # type: ignore[no-untyped-call]
        self.sizes = [len(menu) for menu in relaxation.menus]
        self.sites = nn.ModuleList(
            SoftSite(model, relaxation, menu, frozen=frozen) for menu in relaxation.menus
        )
        self.opened: Opened | None = None
        self.clock: ModelClock | None = None
        self.allowed: Budget | None = None
        self.seconds = 0.0
        self._set: Tensor | None = None
        self._held: dict[str, Tensor] | None = None

    # Training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with its soft weights."""
        weights = self.soft_weights() if self._held is None else self._held
        # Tied layers are all named; a module of two names would not be given its own weight back.
        return torch.func.functional_call(self.model, weights, args, kwargs, tie_weights=False)

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
        target = FIRST_ENTROPY ** (1 - progress) * LAST_ENTROPY**progress
        # In half precision a share of the budget is told to half a percent.
        with torch.autocast(self.scores.device.type, enabled=False):
            probabilities = self.probabilities()
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
            return self._set.to(self.scores)
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

    @contextmanager
    def holding(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Compute with these weights, from `soft_weights`, for several batches."""
        before, self._held = self._held, weights
        try:
            yield
        finally:
            self._held = before

    def entropy(self, probabilities: Tensor) -> Tensor:
        """Mean entropy of the sites, as a share of the uniform distribution's."""
        terms = -probabilities * probabilities.clamp_min(1e-30).log()
        nats = torch.zeros_like(self.log_sizes).to(terms).index_add(0, self.owner, terms)
        share: Tensor = (nats / self.log_sizes).mean()
        return share

    def expected_cost(self) -> dict[str, float]:
        """Axis to the expected figure of the whole model, as a share of the budget's bound."""
        with torch.no_grad(), torch.autocast(self.scores.device.type, enabled=False):
            used = self.probabilities() @ self.shares + 1 - self.room
        return dict(zip(self.relaxation.axes, used.tolist(), strict=True))

    def soft_weights(self) -> dict[str, Tensor]:
        """Parameter name in the model to its soft weight or bias, as stored."""
        named: dict[str, Tensor] = {}
        # Autocast would project the weights in half precision.
        with torch.autocast(self.scores.device.type, enabled=False):
            parts = self.probabilities().split(self.sizes)
            for site, part in zip(self.sites, parts, strict=True):
                named.update(site(self.model, part))
        return named

    # Results

    @measure.outside_inference_mode
    def discretise(self) -> RankPlan:
        """The plan of the most probable ranks within the budget.

        Costs are those of the built model and within the budget, a budget on latency by
        the whole model's measured time; the errors it states are those of the weights
        `soften` was given. Once those were trained, the plan says that its factors are
        learned, and only `build` carries it out.

        Raises:
            BudgetInfeasible: No plan was measured to be fast enough.
            ModelError: The logits are not finite: the training diverged.
        """
        opened = self.opened
        assert opened is not None, "made by soften()"
        strategy = Trained(self)
        with torch.no_grad(), measure.preserve_rng():
            if self.clock is None:
                plan = strategy.search(opened.problem)
            else:
                asked = opened.problem.with_budget(self.allowed)
                plan = solve(asked, strategy, self.clock.measure, self.clock.dense_ms)
            plan = opened.finish(plan, seconds=self.seconds)
        changed = measure.weights_digest(self.model) != measure.weights_digest(opened.view)
        return _learned(plan, self.model) if changed else plan

    def rounded(self, problem: Problem) -> list[Option]:
        """The most probable options within a problem's budget, one per site.

        Args:
            problem: That of `soften`, its budget tighter or looser on the same axes.

        Raises:
            ModelError: The logits are not finite.
        """
        relaxation = self.relaxation.within(problem)
        scores = self.scores.detach().double().cpu().numpy()
        if not np.isfinite(scores).all():
            bad = relaxation.owner[~np.isfinite(scores)][0]
            raise ModelError(
                f"layer {relaxation.menus[bad].site.name}: its rank logits are not finite, the "
                "training diverged; lower the learning rate or clip the gradients"
            )
        logs = np.log(np.maximum(relaxation.softmax(scores), 1e-300))
        prices = self.multipliers[:-1].double().cpu().numpy()
        return relaxation.options(relaxation.round(logs, np.square(relaxation.error), prices))

    @measure.outside_inference_mode
    def settle(self, plan: RankPlan) -> None:
        """Compute with a plan's ranks alone from now on: the weights train on as `build` has them.

        It is part of the state that `state_dict` gives.

        Args:
            plan: From `discretise`.

        Raises:
            ModelError: A plan of other options.
        """
        self.settled.copy_(self._certain(plan))
        _settled_as_loaded(self)

    @measure.outside_inference_mode
    def build(self, plan: RankPlan) -> nn.Module:
        """The small model, with the weights as trained.

        Args:
            plan: From `discretise`.

        Returns:
            A new model of plain layers, as `rankopt.apply` makes; it computes what this
            one does with the plan's ranks. The plan it carries says that its factors were
            learned: they cannot be made again from the weights of the model that was softened.
        """
        opened = self.opened
        assert opened is not None, "made by soften()"
        with torch.no_grad(), measure.preserve_rng():
            with self.using(self._certain(plan)):
                projected = self.soft_weights()
            dense = surgery.clone(self.model)
            parameters = {
                surgery.normalised(name): parameter
                for name, parameter in dense.named_parameters(remove_duplicate=False)
            }
            for name, value in projected.items():
                parameters[name].copy_(value)
            # The weights have the ranks of the plan now: any factors of those are exact, but
            # a fit need not find them.
            own = {}
            for site, menu in zip(self.sites, self.relaxation.menus, strict=True):
                assert isinstance(site, SoftSite)
                decision = plan[menu.site.name]
                for method in menu.site.methods:
                    if made_by(method, decision.method, decision.args):
                        own[menu.site.name] = site.factors(self.model, method, decision.ranks)
            built = surgery.clone(build_with_factors(dense, plan.changes, own))
        remember_plan(built, _learned(plan, built))
        return built

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftModel:
        """Weights and logits of its own; what `soften` found out is shared."""
        for shared in (self.opened, self.clock, self.relaxation):
            memo[id(shared)] = shared
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _certain(self, plan: RankPlan) -> Tensor:
        """[options] one for each site's option in the plan."""
        sure = torch.zeros_like(self.scores)
        for menu, start in zip(self.relaxation.menus, self.relaxation.starts, strict=True):
            decision = plan[menu.site.name]
            named = [
                decision.keeps
                if method is None
                else made_by(method, decision.method, decision.args) and ranks == decision.ranks
                for method, ranks in zip(menu.methods, menu.ranks, strict=True)
            ]
            if True not in named:
                raise ModelError(
                    f"layer {menu.site.name}: {decision.method} at ranks {list(decision.ranks)} is "
                    "no option of this soft model; build the plan that discretise() gave"
                )
            sure[int(start) + named.index(True)] = 1.0
        return sure


def _settled_as_loaded(soft: SoftModel, _: Any = None) -> None:
    """Compute with the ranks of the state, or with the logits' where it has none."""
    soft._set = soft.settled if soft.settled.any() else None
    soft.scores.requires_grad_(soft._set is None)


def _learned(plan: RankPlan, trained: nn.Module) -> RankPlan:
    """The plan of factors that training changed, told by the digest of what holds them."""
    factors = Factors("learned", measure.weights_digest(trained))
    return replace(
        plan, decisions=tuple(d if d.keeps else replace(d, factors=factors) for d in plan)
    )
