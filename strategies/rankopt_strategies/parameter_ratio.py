"""`parameter_ratio`: ranks from a formula, the same compression for every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

from rankopt._decompositions.base import Decomposition, kernel_size
from rankopt._utils.arguments import is_number
from rankopt.errors import ModelError
from rankopt.plan import RankPlan
from rankopt.strategy import Option, Problem, Site, Strategy, Tags

__all__ = ["ParameterRatio", "svd_rank", "tucker2_ranks"]


def svd_rank(inputs: int, outputs: int, ratio: float) -> int:
    """Largest rank whose two factors have 1/`ratio` of the parameters.

    r = ⌊CS / (α(C + S))⌋ for C inputs, S outputs and ratio α; at least 1.

    Example:
        >>> svd_rank(2048, 512, 2.0)
        204
    """
    return max(1, math.floor(inputs * outputs / (ratio * (inputs + outputs))))


def tucker2_ranks(
    inputs: int, outputs: int, kernel: int, ratio: float, beta: float | None = None
) -> tuple[int, int]:
    """Ranks of a Tucker-2 chain with 1/`ratio` of the parameters.

    Solves βk²r₁² + (C + βS)r₁ − CSk²/α = 0 with r₂ = βr₁ (arXiv 2407.20266,
    eq. 7), rounded down, at least 1 and at most C and S.

    Args:
        inputs: C.
        outputs: S.
        kernel: k², pixels of the kernel.
        ratio: α.
        beta: r₂/r₁; S/C if None.

    Example:
        >>> tucker2_ranks(512, 512, 9, 2.0)
        (309, 309)
    """
    elements = inputs * outputs * kernel / ratio
    first, second = _tucker2_roots(inputs, outputs, kernel, elements, beta)
    return min(inputs, first), min(outputs, second)


def _tucker2_roots(
    inputs: int, outputs: int, kernel: float, elements: float, beta: float | None
) -> tuple[int, int]:
    """Ranks, whatever the channels, of a chain with so many weight elements."""
    beta = outputs / inputs if beta is None else beta
    quadratic, linear = beta * kernel, inputs + beta * outputs
    first = (math.sqrt(linear**2 + 4 * quadratic * elements) - linear) / (2 * quadratic)
    return max(1, math.floor(first)), max(1, math.floor(beta * first))


@dataclass(frozen=True)
class ParameterRatio(Strategy):
    """Compress every layer by the same factor.

    With a budget the factor is bisected to it, kept layers counted; without
    one, `ratio` holds for each layer.

    SVD and Tucker-2 ranks follow from closed formulas. Other decompositions get the
    largest ranks, all the same share of their maxima, that compress as much.

    Args:
        ratio: Parameters of a layer before / after, above 1.
        beta: Output over input rank of Tucker-2; None for S/C of each layer.
        overrides: Glob on the layer's name to its own ratio, whatever the budget
            asks of the others; 1 keeps the layer. The first match counts.

    References:
        arXiv 2407.20266, section 2.1.
    """

    name: ClassVar[str] = "parameter_ratio"
    tags: ClassVar[Tags] = Tags()
    ratio: float = 2.0
    beta: float | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (is_number(self.ratio) and self.ratio > 1):
            raise ValueError(f"ratio={self.ratio!r}: parameters before / after lie above 1")
        if self.beta is not None and not (is_number(self.beta) and self.beta > 0):
            raise ValueError(f"beta={self.beta!r}: expected a positive number")
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides={self.overrides!r}: expected globs and their ratios")
        for pattern, ratio in self.overrides.items():
            if not (is_number(ratio) and ratio >= 1):
                raise ValueError(f"overrides[{pattern!r}]={ratio!r}: a ratio is at least 1")

    def search(self, problem: Problem) -> RankPlan:
        """Bisect the ratio to the budget; see `Strategy.search`."""
        for pattern in self.overrides:
            if not any(_named(site, pattern) for site in problem.sites):
                raise ModelError(
                    f"overrides[{pattern!r}] matches no layer that can be decomposed; those are "
                    f"{', '.join(site.name for site in problem.sites[:6])}, …"
                )
        if problem.budget is None:
            return problem.plan(self, self._choose(problem, self.ratio))
        # Knob 0 is the ratio at which every layer is down to rank 1.
        top = max(math.prod((*site.layer.shape, 2)) for site in problem.sites)
        _, options = problem.fit(lambda knob: self._choose(problem, top ** (1 - knob)))
        return problem.plan(self, options)

    def _choose(self, problem: Problem, ratio: float) -> list[Option]:
        options = []
        for site in problem.sites:
            method, own = site.methods[0], self._override(site)
            if own == 1:
                options.append(problem.keep(site, "overrides= asks for a ratio of 1"))
                continue
            ranks = self._ranks(site, method, ratio if own is None else own)
            reason = f"parameter ratio {ratio if own is None else own:.4g}"
            options.append(problem.option(site, method, ranks, reason))
        return options

    def _override(self, site: Site) -> float | None:
        return next((r for p, r in self.overrides.items() if _named(site, p)), None)

    def _ranks(self, site: Site, method: Decomposition, ratio: float) -> Sequence[int]:
        inputs, outputs = site.layer.group_shape
        if method.name == "svd":
            return (svd_rank(inputs, outputs, ratio),)
        axes = method.rank_axes(site.layer)
        if method.name in ("tucker2", "branched_tucker"):
            # N branches divide the core's part of the quadratic by N.
            size = kernel_size(site.layer) / axes[0].step
            elements = site.layer.params / site.layer.groups / ratio
            found = _tucker2_roots(inputs, outputs, size, elements, self.beta)
            return [min(rank, axis.maximum) for rank, axis in zip(found, axes, strict=True)]
        return _aligned(method, site, ratio)


def _named(site: Site, pattern: str) -> bool:
    """Whether a glob matches any name of any of a site's layers."""
    return any(fnmatchcase(name, pattern) for layer in site.layers for name in layer.names)


def _aligned(method: Decomposition, site: Site, ratio: float) -> list[int]:
    """The largest ranks, all the same share of their maxima, with 1/`ratio` of the parameters."""
    tops = [axis.maximum for axis in method.rank_axes(site.layer)]

    def ranks(share: float) -> list[int]:
        return [max(1, math.floor(share * top + 1e-9)) for top in tops]

    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        fits = method.params(site.layer, ranks(share)) * ratio <= site.layer.params
        low, high = (share, high) if fits else (low, share)
    return ranks(low)
