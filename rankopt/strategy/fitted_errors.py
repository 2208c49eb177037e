"""Options with fitted errors in place of estimates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from rankopt._decompositions.base import Basis, made_by
from rankopt._utils.parallel import for_each, largest_first
from rankopt._utils.progress import progress_bar
from rankopt.strategy.sites import Option, Site

__all__ = ["fitted_errors"]


def fitted_errors(
    sites: Sequence[Site],
    options: Sequence[Option],
    basis: Callable[..., Basis],
    device: Callable[[Site], torch.device],
    *,
    progress: bool | None = None,
) -> list[Option]:
    """The options, those that state an estimated error with the one of a fit.

    Args:
        sites: The sites.
        options: One for each.
        basis: As `Problem.basis`.
        device: Where the weight of a site lies.
        progress: Whether to show a progress bar; None decides by the terminal.
    """
    settled = list(options)
    methods = {
        index: next(m for m in site.methods if made_by(m, option.method, option.args))
        for index, (site, option) in enumerate(zip(sites, options, strict=True))
        if option.error is not None and not option.keeps
    }
    fitted = [index for index, method in methods.items() if not method.exact_error]
    if not fitted:
        return settled

    def fit(index: int) -> None:
        option = options[index]
        found = basis(sites[index], methods[index], fisher=option.factors.fisher)
        settled[index] = replace(option, error=found.fitted_error(option.args["ranks"]))

    largest = largest_first(fitted, lambda index: sites[index].layer.params)
    with progress_bar("fitting", len(fitted), enabled=progress) as advance:
        for _ in for_each(fit, largest, device=device(sites[fitted[0]])):
            advance()
    return settled
