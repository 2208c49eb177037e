"""The published search: independent candidates, multiplicative losses, refined intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._decompositions.base import Decomposition
from rankopt._decompositions.rebuild import rebuild
from rankopt._utils.arguments import check_integer, is_number
from rankopt.errors import LayerError, ModelError, warn
from rankopt.strategy import Option, Problem, Site
from rankopt_strategies.relaxed.annealing import Record, finite
from rankopt_strategies.relaxed.objective import Objective
from rankopt_strategies.relaxed.resuming import Checkpoint

__all__ = ["RelaxedSettings", "search_candidates"]

# Gradients are clipped to this norm: CP's would make the logits NaN.
GRADIENT_NORM: Final = 5.0
# How often a diverging search steps back before it gives up.
PATIENCE: Final = 5
# Updates between steps of the record, checkpoints and values to step back to.
KEPT_EVERY: Final = 10
# Octaves that the common factor on the ranks spans on either side, to meet a budget.
OCTAVES: Final = 10


@dataclass(frozen=True)
class RelaxedSettings:
    """Settings of ``mode="paper"`` (arXiv 2409.03555); the defaults are those for CIFAR.

    Args:
        low: Smallest candidate rank; candidates are clipped to what a layer can have.
        high: Largest.
        step: Distance between the candidates of the first round.
        shrink: What the distance is divided by from round to round.
        gamma: Weight of the rank loss.
        beta: Its exponent.
        warmup: Steps on the factors alone, at the start of a round.
        updates: Alternating steps of a round.
        learning_rate: Of the factors; SGD with Nesterov momentum 0.9.
        logit_rate: Of the logits. At the published rate, 1e-3, they hardly leave
            the uniform distribution and the ranks follow its gradient alone.

    Example:
        >>> RelaxedSettings.imagenet().step
        100
    """

    low: int = 10
    high: int = 100
    step: int = 10
    shrink: int = 10
    gamma: float = 0.4
    beta: float = 0.8
    warmup: int = 20
    updates: int = 100
    learning_rate: float = 1e-3
    logit_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("low", "high", "step", "shrink", "warmup", "updates"):
            check_integer(name, getattr(self, name), {"shrink": 2, "warmup": 0}.get(name, 1))
        if self.high < self.low:
            raise ValueError(
                f"high={self.high}, low={self.low}: the set of candidates is empty; "
                "high is at least low"
            )
        if self.step > max(self.high - self.low, 1):
            raise ValueError(
                f"step={self.step}: larger than the range of candidates, {self.low} to "
                f"{self.high}; take at most {max(self.high - self.low, 1)}"
            )
        for name in ("gamma", "beta", "learning_rate", "logit_rate"):
            number = getattr(self, name)
            if not is_number(number) or number <= 0:
                raise ValueError(f"{name}={number!r}: expected a positive number")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> RelaxedSettings:
        """From a mapping of names to values, such as a plan holds.

        Raises:
            ValueError: A name that is no setting, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = [str(name) for name in settings if name not in known]
        if unknown:
            raise ValueError(
                f"paper has no setting {', '.join(unknown)}; it has {', '.join(known)}"
            )
        return cls(**settings)

    @classmethod
    def cifar(cls) -> RelaxedSettings:
        """As published for CIFAR: ranks {10, 20, …, 100}, then single ranks."""
        return cls()

    @classmethod
    def imagenet(cls) -> RelaxedSettings:
        """As published for ImageNet: {50, 150, …, 850}, then steps of 10, then 1."""
        return cls(low=50, high=850, step=100)


class _Candidates(nn.Module):
    """Independent factors of each candidate rank of a site, and their logits."""

    def __init__(self, problem: Problem, site: Site, ranks: Sequence[int]) -> None:
        super().__init__()
        self.site, self.ranks = site, tuple(ranks)
        self.method = method_of(site)
        weight = problem.weight(site.layer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.target = weight.to(dtype)
        basis = problem.basis(site, self.method)
        self.factors = nn.ModuleList()
        self.names: list[list[str]] = []
        for rank in self.ranks:
            named = basis.factors(self.clipped(rank))
            self.names.append(list(named))
            values = [nn.Parameter(value.to(dtype).clone()) for value in named.values()]
            self.factors.append(nn.ParameterList(values))
        self.logits = nn.Parameter(torch.zeros(len(self.ranks), device=weight.device))

    def clipped(self, rank: int) -> tuple[int, ...]:
        """The rank of every axis: `rank`, or the axis's largest."""
        return clip(self.site, rank)

    def mixed(self) -> Tensor:
        """Canonical weight Σ p_r Ŵ(r)."""
        total = torch.zeros_like(self.target)
        shares = self.logits.softmax(0)
        for index, (probability, rank) in enumerate(zip(shares, self.ranks, strict=True)):
            values = self.factors[index].parameters()
            named = dict(zip(self.names[index], values, strict=True))
            built = rebuild(self.method, self.site.layer, self.clipped(rank), named)
            total = total + probability * built
        return total

    def rank_share(self) -> Tensor:
        """Expected rank as a share of the largest candidate."""
        ranks = torch.tensor(self.ranks, dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits.softmax(0) @ ranks) / ranks.max()


def method_of(site: Site) -> Decomposition:
    """The first decomposition allowed for the site."""
    return site.methods[0]


def clip(site: Site, rank: int) -> tuple[int, ...]:
    """`rank` for every axis, or the feasible one nearest below it."""
    axes = method_of(site).rank_axes(site.layer)
    return tuple(min(max(rank // axis.step * axis.step, axis.step), axis.maximum) for axis in axes)


def largest(site: Site) -> int:
    """The largest rank that still tells candidates of the site apart."""
    return max(axis.maximum for axis in method_of(site).rank_axes(site.layer))


def search_candidates(
    problem: Problem,
    settings: RelaxedSettings,
    objective: Objective | None,
    record: Record,
    checkpoint: Checkpoint,
) -> list[Option]:
    """Rounds of optimisation and refinement; the ranks then scaled to the budget, if any.

    Args:
        problem: The model.
        settings: See `RelaxedSettings`.
        objective: The loss on data; None for the reconstruction of the weights.
        record: Takes every tenth update.
        checkpoint: Keeps the state at every tenth update, and is gone on from.

    Raises:
        LayerError: No layer has ranks as large as the candidates.
        ModelError: The search diverges time and again.
    """
    if all(largest(site) < settings.low for site in problem.sites):
        widest = max(problem.sites, key=largest)
        raise LayerError(
            f"layer {widest.name}: candidates from {settings.low} to {settings.high} are outside "
            f"its feasible ranks, 1 to {largest(widest)}, and no layer has more; lower low="
        )
    wanted = list(range(settings.low, settings.high + 1, settings.step))
    state = checkpoint.load()
    offered = state.get("offered") or [_feasible(site, wanted) for site in problem.sites]
    step = state.get("step", settings.step)
    record.restore(state.get("steps", []))
    while True:
        run = _Run(problem, settings, offered, objective)
        run.restore(state.pop("run", None))

        def keep(run: _Run = run, step: int = step, offered: list[list[int]] = offered) -> None:
            checkpoint.save(run=run.state(), step=step, offered=offered, steps=record.steps)

        chosen = run.to_end(record, keep)
        half, step = step // 2, step // settings.shrink
        if step < 1:
            break
        offered = [
            _feasible(site, range(rank - half, rank + half + 1, step))
            for site, rank in zip(problem.sites, chosen, strict=True)
        ]

    def options(scale: float) -> list[Option]:
        reason = "most probable candidate" + ("" if scale == 1 else f", scaled by {scale:.3g}")
        return [
            problem.option(site, method_of(site), clip(site, round(rank * scale)), reason)
            for site, rank in zip(problem.sites, chosen, strict=True)
        ]

    if problem.budget is None:
        return options(1.0)
    return problem.fit(lambda knob: options(2.0 ** (OCTAVES * (2 * knob - 1))))[1]


def _feasible(site: Site, wanted: Sequence[int] | range) -> list[int]:
    return sorted({max(1, min(rank, largest(site))) for rank in wanted})


class _Run:
    """One optimisation over the candidates offered."""

    def __init__(
        self,
        problem: Problem,
        settings: RelaxedSettings,
        offered: Sequence[Sequence[int]],
        objective: Objective | None,
    ) -> None:
        self.problem, self.settings, self.objective = problem, settings, objective
        pairs = zip(problem.sites, offered, strict=True)
        self.sites = [_Candidates(problem, site, ranks) for site, ranks in pairs]
        factors = [v for site in self.sites for part in site.factors for v in part.parameters()]
        self.trained = (factors, [site.logits for site in self.sites])
        self.rates = [settings.learning_rate, settings.logit_rate]
        self.update, self.setbacks = -settings.warmup, 0
        self.good = _copies(self._all)
        self.optimisers = self._fresh()

    @property
    def _all(self) -> list[nn.Parameter]:
        return [*self.trained[0], *self.trained[1]]

    def _fresh(self) -> list[torch.optim.Optimizer]:
        return [_sgd(v, rate) for v, rate in zip(self.trained, self.rates, strict=True)]

    def to_end(self, record: Record, keep: Callable[[], None]) -> list[int]:
        """Train; the most probable candidate of each site."""
        while self.update < self.settings.updates:
            self.problem.check_deadline()
            loss = self._alternate()
            noted = self.update % KEPT_EVERY == 0
            if noted:
                self.good = _copies(self._all)
                record.step(_step(self.sites, self.update, float(loss.detach())))
            self.update += 1
            if noted:
                keep()
        return [site.ranks[int(site.logits.argmax())] for site in self.sites]

    def _alternate(self) -> Tensor:
        """A step on the factors and, after the warm-up, one on the logits."""
        for phase in (0,) if self.update < 0 else (0, 1):
            objective = self.objective if phase else None
            loss = _loss(self.problem, self.sites, self.settings, objective)
            gradients = torch.autograd.grad(loss, self.trained[phase], allow_unused=True)
            finite = bool(loss.isfinite()) and all(
                bool(g.isfinite().all()) for g in gradients if g is not None
            )
            if not finite:
                self._step_back(float(loss.detach()))
                break
            for parameter, gradient in zip(self.trained[phase], gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(self.trained[phase], GRADIENT_NORM)
            self.optimisers[phase].step()
        return loss

    def _step_back(self, loss: float) -> None:
        self.setbacks += 1
        if self.setbacks > PATIENCE:
            raise ModelError(
                f"the search over candidates diverged {self.setbacks} times (loss {loss}); lower "
                "learning_rate="
            )
        warn(
            f"the search diverged at update {self.update}: stepping back, with half the "
            "learning rate"
        )
        self.rates = [rate / 2 for rate in self.rates]
        _restore(self._all, self.good)
        self.optimisers = self._fresh()

    def state(self) -> dict[str, Any]:
        """All that the next update depends on."""
        return {
            "values": _copies(self._all),
            "good": self.good,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "rates": self.rates,
            "update": self.update,
            "setbacks": self.setbacks,
            "position": None if self.objective is None else self.objective.position,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a `state`."""
        if state is None:
            return
        _restore(self._all, state["values"])
        self.rates, self.update, self.setbacks = state["rates"], state["update"], state["setbacks"]
        self.good = [v.to(p.device) for v, p in zip(state["good"], self._all, strict=True)]
        self.optimisers = self._fresh()
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        if self.objective is not None:
            self.objective.position = state["position"]


def _loss(
    problem: Problem,
    sites: Sequence[_Candidates],
    settings: RelaxedSettings,
    objective: Objective | None,
) -> Tensor:
    """Reconstruction, or the loss on data, times the rank loss."""
    mixed = [site.mixed() for site in sites]
    shares = torch.stack([site.rank_share() for site in sites])
    ranks = settings.gamma * (shares**settings.beta).sum()
    if objective is not None:
        weights = {site.site.name: weight for site, weight in zip(sites, mixed, strict=True)}
        return objective.with_weights(problem, weights) * ranks
    lost = [
        (weight - site.target).square().sum() for site, weight in zip(sites, mixed, strict=True)
    ]
    return torch.stack(lost).sum() * ranks


def _step(sites: Sequence[_Candidates], update: int, loss: float) -> dict[str, Any]:
    spread = [site.logits.detach().softmax(0) for site in sites]
    entropies = [float(-(p * p.log()).sum() / math.log(max(len(p), 2))) for p in spread]
    return {
        "update": update,
        "loss": finite(float(f"{loss:.6g}")),
        "entropy": round(sum(entropies) / len(entropies), 6),
        "ranks": [site.ranks[int(p.argmax())] for site, p in zip(sites, spread, strict=True)],
        "surest": [round(float(p.max()), 4) for p in spread],
    }


def _sgd(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True)


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
