"""The strategy and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from rankopt._utils.arguments import check_choice, check_integer, check_path
from rankopt.errors import DeadlineExceeded, ModelError
from rankopt.plan import RankPlan
from rankopt.soft import SoftModel
from rankopt.strategy import Problem, Strategy, Tags, check_share
from rankopt.strategy.allocation import TIE_BREAK, damage_of, menu, sensitivities
from rankopt.strategy.relaxation import Relaxation
from rankopt_strategies.relaxed.annealing import Record, anneal, finite
from rankopt_strategies.relaxed.logs import StepLog
from rankopt_strategies.relaxed.losses import Losses
from rankopt_strategies.relaxed.measuring import measured
from rankopt_strategies.relaxed.objective import Criterion, Objective, distillation, task
from rankopt_strategies.relaxed.paper import RelaxedSettings, search_candidates
from rankopt_strategies.relaxed.refining import refine
from rankopt_strategies.relaxed.resuming import Checkpoint

__all__ = ["Relaxed"]

Array = npt.NDArray[np.float64]
# How much a site's own divergence foretells of its effect among others (see `Knapsack`).
TEMPER = 0.5


@dataclass(frozen=True)
class Relaxed(Strategy):
    """Ranks as probabilities over every option of a layer, annealed under the budget.

    Each layer has one distribution over *dense* and all undominated ranks of its
    decompositions. The loss that is minimised is the expected one: that of the mixture
    would reward fractional ranks. Multipliers hold the expected cost at the budget, in
    the budget's own unit, while the entropy falls; rounding then fills the budget.

    Args:
        mode: ``nested``, or ``paper`` for the published search (arXiv 2409.03555):
            independent candidates, multiplicative losses, tied ranks. It has no budget of
            its own; under one, its ranks are scaled by a common factor.
        objective: ``reconstruction`` sums the layers' own damages and needs no data.
            ``distillation`` keeps the outputs on the calibration inputs close to the dense
            model's. ``task`` minimises `criterion` on `data`. ``auto`` is ``distillation``
            given calibration inputs, else ``reconstruction``.
        entropy: Where annealing ends: mean entropy of the layers' distributions, as a
            share of the uniform one's, in (0, 1].
        rounds: Of a loss on data, at most.
        slopes: Where a loss on data says what ranks are worth: ``measured`` moves one site
            at a time, two runs of half the data for each; ``gradient`` is one pass forward
            and backward for all sites, for models with hundreds of them.
        batch_size: Samples per batch of a distillation.
        temperature: Of the class probabilities that a distillation compares. At 1 a few
            samples, surely wrong, make up most of the loss; a higher one has
            differences between choices that hold on other inputs too.
        data: For ``task``: an iterable of (inputs, targets), gone through once, here, and held.
        criterion: For ``task``: a scalar tensor from (output, targets).
        paper: Settings of the published search, such as `RelaxedSettings.imagenet`.
        log: A file that takes one line of JSON per step, while it runs; budgets that take several
            searches, as those on latency, leave that of the last.
        tensorboard: A folder for the same steps as TensorBoard events (extra ``tensorboard``).
        folder: Where a search keeps its state; one that was killed goes on from there to
            the same result. A search without data takes seconds and keeps none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> plan = rankopt.search(model, "params<=50%", strategy=Relaxed())
        >>> plan["0"].ranks
        (15,)
    """

    name: ClassVar[str] = "relaxed"
    tags: ClassVar[Tags] = Tags(monotone=False, unbudgeted=False)
    mode: Literal["nested", "paper"] = "nested"
    objective: Literal["auto", "reconstruction", "distillation", "task"] = "auto"
    entropy: float = 0.02
    rounds: int = 24
    batch_size: int = 128
    temperature: float = 1.0
    data: Iterable[Any] | None = field(default=None, repr=False)
    criterion: Criterion | None = field(default=None, repr=False)
    paper: RelaxedSettings = field(default_factory=RelaxedSettings)
    slopes: Literal["measured", "gradient"] = "gradient"
    log: str | None = None
    tensorboard: str | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("nested", "paper"))
        known = ("auto", "reconstruction", "distillation", "task")
        check_choice("objective", self.objective, known)
        check_choice("slopes", self.slopes, ("measured", "gradient"))
        check_share("entropy", self.entropy)
        if self.entropy == 0:
            raise ValueError("entropy=0: annealing never gets there; expected a share above 0")
        for name in ("rounds", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        for name in ("log", "tensorboard", "folder"):
            check_path(name, getattr(self, name))
        check_share("temperature", self.temperature, low=1e-3, high=1e3)
        given = (self.data is not None, self.criterion is not None)
        if given != (self.objective == "task",) * 2:
            raise ValueError(
                "objective='task' goes with data=, an iterable of (inputs, targets), and "
                "criterion=, such as torch.nn.functional.cross_entropy"
            )
        if isinstance(self.paper, Mapping):  # as it stands in a plan
            object.__setattr__(self, "paper", RelaxedSettings.of(self.paper))
        if not isinstance(self.paper, RelaxedSettings):
            raise ValueError(
                f"paper={self.paper!r}: expected a RelaxedSettings, or a mapping of its settings "
                "such as {'low': 10, 'high': 100, 'step': 10}"
            )
        if self.data is not None and not isinstance(self.data, (list, tuple)):
            # Held: a budget may search repeatedly, and so may the user.
            object.__setattr__(self, "data", list(self.data))

    @property
    def promises(self) -> Tags:
        """The published search has an answer without a budget."""
        return replace(self.tags, unbudgeted=self.mode == "paper")

    def describe(self, seed: int) -> dict[str, Any]:
        """Name, settings and seed; data and criterion are no settings."""
        places = {key: getattr(self, key) for key in ("log", "tensorboard", "folder")}
        return {
            "name": self.name,
            "settings": {**self._deciding(), **places},
            "seed": seed,
        }

    def _deciding(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        names = ("mode", "objective", "entropy", "rounds", "slopes", "batch_size", "temperature")
        return {**{name: getattr(self, name) for name in names}, "paper": asdict(self.paper)}

    def search(self, problem: Problem) -> RankPlan:
        """Anneal, refine on data if there is any, round; see `Strategy.search`."""
        sites = [site.name for site in problem.sites]
        with StepLog(self.log, self.tensorboard, sites) as log:
            objective = self._objective(problem)
            dense_loss = None if objective is None else objective.check()
            problem.prepare()
            checkpoint = Checkpoint(self.folder, self._deciding(), problem, objective, dense_loss)
            record = Record(sites, listen=log.add, begin=log.begin)
            if self.mode == "paper":
                return self._published(problem, objective, record, checkpoint)
            record.restore([])
            if objective is None:
                return self._without_data(problem, record)
            return self._on_data(problem, objective, record, checkpoint)

    def _without_data(self, problem: Problem, record: Record) -> RankPlan:
        relaxation = Relaxation(problem)
        damage = reconstruction(relaxation)
        logs, prices, _ = anneal(relaxation, damage, self.entropy, record)
        chosen = relaxation.round(logs, damage, prices, exact=True)
        facts = {
            "damage": float(damage[chosen].sum()),
            "bound": relaxation.bound(damage, prices),
        }
        plan = problem.plan(self, relaxation.options(chosen))
        return problem.annotate(plan, {self.name: {**facts, **record.summary()}})

    def _on_data(
        self, problem: Problem, objective: Objective, record: Record, checkpoint: Checkpoint
    ) -> RankPlan:
        relaxation = Relaxation(problem)
        losses = Losses(SoftModel(objective.model, relaxation, frozen=True), objective, checkpoint)
        search = measured if self.slopes == "measured" else refine
        found = search(
            losses,
            reconstruction(relaxation),
            _first_weights(problem),
            entropy=self.entropy,
            rounds=self.rounds,
            record=record,
        )
        facts: dict[str, Any] = {
            "soft_loss": finite(found.soft_loss),
            "first_loss": finite(found.first_loss),
        }
        place = len(found.path) - 1
        if problem.asymmetric:
            facts["distances"] = _distances(problem, relaxation, found.path)
            place = int(np.argmin(facts["distances"])) if facts["distances"] else place
        facts["loss"] = finite(found.losses[place])
        plan = problem.plan(self, relaxation.options(found.path[place]))
        return problem.annotate(plan, {self.name: {**facts, **record.summary()}})

    def _published(
        self,
        problem: Problem,
        objective: Objective | None,
        record: Record,
        checkpoint: Checkpoint,
    ) -> RankPlan:
        with torch.enable_grad():
            options = search_candidates(problem, self.paper, objective, record, checkpoint)
        plan = problem.plan(self, options)
        return problem.annotate(plan, {self.name: record.summary()})

    def _objective(self, problem: Problem) -> Objective | None:
        if self.objective == "task":
            assert self.data is not None
            assert self.criterion is not None
            objective = task(problem, self.data, self.criterion)
        elif self.objective == "reconstruction" or not problem.inputs:
            if self.objective == "distillation":
                raise ModelError("objective='distillation' needs calibration=")
            return None
        else:
            objective = distillation(problem, self.batch_size, self.temperature)
        return objective


def reconstruction(relaxation: Relaxation) -> Array:
    """[options] what each loses of its own layer, `rankopt.strategy.allocation.damage_of`."""
    scores = [
        damage_of(menu.error, aware=menu.site.name in relaxation.problem.moments)
        + TIE_BREAK * menu.shares.mean(axis=1)
        for menu in relaxation.menus
    ]
    return np.concatenate(scores)


def _distances(problem: Problem, relaxation: Relaxation, path: Sequence[list[int]]) -> list[float]:
    """How far the outputs of each choice's model are from the dense one's, fitted in order.

    The loss along the path is that of factors for dense inputs. Where factors answer for the
    errors of the layers before, a later choice need not be better.

    Args:
        problem: With calibration inputs.
        relaxation: Of it.
        path: See `rankopt_strategies.relaxed.refining.Refined`.

    Returns:
        Of as many choices as the deadline allowed.
    """
    assert problem.distance is not None
    found = list[float]()
    for chosen in path:
        options = [option.in_order() for option in relaxation.options(chosen)]
        try:
            found.append(problem.distance(problem.decisions(options)))
        except DeadlineExceeded:  # there is a plan
            break
    return found


def _first_weights(problem: Problem) -> Array:
    """[sites] tempered sensitivities where they can be measured."""
    found = sensitivities(problem, [menu(problem, site) for site in problem.sites])
    return np.ones(len(problem.sites)) if found is None else np.array(found) ** TEMPER
