"""The published search: independent candidates, multiplicative losses, refined intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.rebuild import rebuild
from rankopt.errors import LayerError, ModelError, RankoptWarning
from rankopt.strategy import Option, Problem, Site
from rankopt_strategies.relaxed.annealing import Record
from rankopt_strategies.relaxed.objective import Objective

__all__ = ["RelaxedSettings", "search_candidates"]

# Gradients are clipped to this norm: CP's would make the logits NaN.
GRADIENT_NORM: Final = 5.0
# How often a diverging search steps back before it gives up.
PATIENCE: Final = 5
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
            value, least = getattr(self, name), 2 if name == "shrink" else int(name != "warmup")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
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
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"{name}={number!r}: expected a number")
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name}={number!r}: expected a positive number")

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
    problem: Problem, settings: RelaxedSettings, objective: Objective | None, record: Record
) -> list[Option]:
    """Rounds of optimisation and refinement; the ranks then scaled to the budget, if any.

    Args:
        problem: The model.
        settings: See `RelaxedSettings`.
        objective: The loss on data; None for the reconstruction of the weights.
        record: Takes every tenth update.

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
    offered = [_feasible(site, wanted) for site in problem.sites]
    step = settings.step
    while True:
        chosen = _round(problem, settings, offered, objective, record)
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


def _round(
    problem: Problem,
    settings: RelaxedSettings,
    offered: Sequence[Sequence[int]],
    objective: Objective | None,
    record: Record,
) -> list[int]:
    """One optimisation over the candidates offered; the most probable of each site."""
    sites = [_Candidates(problem, s, r) for s, r in zip(problem.sites, offered, strict=True)]
    factors = [value for site in sites for part in site.factors for value in part.parameters()]
    logits = [site.logits for site in sites]
    rates = [settings.learning_rate, settings.logit_rate]
    good = _copies([*factors, *logits])
    setbacks = 0
    optimisers = [_sgd(factors, rates[0]), _sgd(logits, rates[1])]
    update = -settings.warmup
    while update < settings.updates:
        problem.check_deadline()
        for phase in (0,) if update < 0 else (0, 1):
            loss = _loss(problem, sites, settings, objective if phase else None)
            trained = (factors, logits)[phase]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            finite = bool(loss.isfinite()) and all(
                bool(g.isfinite().all()) for g in gradients if g is not None
            )
            if not finite:
                setbacks += 1
                if setbacks > PATIENCE:
                    raise ModelError(
                        "the search over candidates diverged "
                        f"{setbacks} times (loss {float(loss.detach())}); lower learning_rate="
                    )
                warnings.warn(
                    f"the search diverged at update {update}: stepping back, with half the "
                    "learning rate",
                    RankoptWarning,
                    stacklevel=4,
                )
                rates = [rate / 2 for rate in rates]
                _restore([*factors, *logits], good)
                optimisers = [_sgd(factors, rates[0]), _sgd(logits, rates[1])]
                break
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
            optimisers[phase].step()
        if update % 10 == 0:
            good = _copies([*factors, *logits])
            record.step(_step(sites, update, float(loss.detach())))
        update += 1
    return [site.ranks[int(site.logits.argmax())] for site in sites]


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
        "loss": float(f"{loss:.6g}"),
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
