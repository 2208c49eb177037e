"""BatchNorm statistics from calibration inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.inputs import MAX_SAMPLES, batches, run

__all__ = [
    "has_norms",
    "norm_statistics",
    "recalibrate",
]

_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def recalibrate(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module | None = None,
    statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    max_samples: int | None = MAX_SAMPLES,
) -> int:
    """Refresh the running statistics of BatchNorm layers from inputs alone, in place.

    Without a teacher they become the exact mean and variance of each layer's
    inputs, pooled over all samples. With one, they are set so that each channel
    leaves the layer with the mean and variance it has in the teacher: the
    statistics of a model equal to its teacher then stay as they are, where
    plain recalibration is known to do harm.

    Args:
        model: Its BatchNorm layers are changed; dropout stays off.
        data: An iterable of inputs, as `calibration` of `rankopt.search`.
        teacher: The dense model, with BatchNorm layers of the same names.
        statistics: The teacher's `norm_statistics` on these inputs, if known already.
        max_samples: Where to stop.

    Returns:
        The number of layers changed; 0 for a model without BatchNorm.

    Raises:
        CalibrationError: It is empty, or no iterable of inputs.
        ModelError: `model` or `teacher` is no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> recalibrate(net, [torch.randn(64, 4)])
        1
    """
    surgery.check_model(model)
    if teacher is not None:
        surgery.check_model(teacher, "teacher")
    norms = _norms_of(model)
    if not norms:
        return 0
    found = _norm_statistics(model, norms, data, max_samples, batch_statistics=teacher is None)
    reference = {} if teacher is None else _norms_of(teacher)
    targets: Mapping[str, tuple[Tensor, Tensor]] = {}
    if teacher is not None:
        targets = (
            statistics
            if statistics is not None
            else norm_statistics(teacher, data, max_samples=max_samples)
        )
    changed = 0
    for name, (mean, variance) in found.items():
        norm = norms[name]
        if name in targets and targets[name][0].shape == mean.shape:
            theirs = reference[name]
            their_mean, their_variance = targets[name]
            # The teacher's channel leaves with mean (m - running_mean) / σ and
            # variance v / σ²; ours shall too.
            ratio = variance / their_variance.clamp_min(theirs.eps)
            new_variance = (theirs.running_var.double() + theirs.eps) * ratio - norm.eps
            shift = (their_mean - theirs.running_mean.double()) * ratio.sqrt()
            mean, variance = mean - shift, new_variance.clamp_min(0)
        elif teacher is not None:
            continue
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        changed += 1
    return changed


def has_norms(model: nn.Module) -> bool:
    """Whether there is a BatchNorm layer with running statistics."""
    return bool(_norms_of(model))


def norm_statistics(
    model: nn.Module, data: Any, *, max_samples: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact (mean, variance) of what each BatchNorm layer of a dense model takes in."""
    return _norm_statistics(model, _norms_of(model), data, max_samples, batch_statistics=False)


def _norms_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in surgery.named_modules(model)
        if isinstance(module, _NORMS) and module.running_mean is not None
    }


def _norm_statistics(
    model: nn.Module,
    norms: Mapping[str, Any],
    data: Any,
    max_samples: int | None,
    *,
    batch_statistics: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact (mean, variance) of the input of each norm.

    With `batch_statistics` the norms run in train mode, so that later layers
    see normalised inputs although the running statistics are stale.
    """
    totals: dict[str, list[Any]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            # Squares in half precision would overflow; float64 squares cancel safely.
            rows = measure.first_argument(args, kwargs).detach().transpose(0, 1).flatten(1)
            rows = rows.to(torch.float64)
            if batch_statistics:  # a single value has no variance, and torch refuses it
                module.training = rows.shape[1] > 1
            entry = totals.setdefault(name, [0, 0.0, 0.0])
            entry[0] += rows.shape[1]
            entry[1] = entry[1] + rows.sum(dim=1)
            entry[2] = entry[2] + rows.square().sum(dim=1)

        return hook

    handles = [
        norm.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, norm in norms.items()
    ]
    saved = {name: _state(norm) for name, norm in norms.items()}
    try:
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(model):
            for norm in norms.values() if batch_statistics else ():
                norm.train()
            for inputs, _ in batches(model, data, max_samples=max_samples):
                run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            for key, value in saved[name].items():
                getattr(norm, key).copy_(value)
    statistics = {}
    for name, (count, total, squares) in totals.items():
        mean = total / count
        statistics[name] = (mean, (squares / count - mean.square()).clamp_min(0))
    return statistics


def _state(norm: Any) -> dict[str, Tensor]:
    keys = ("running_mean", "running_var", "num_batches_tracked")
    return {key: getattr(norm, key).clone() for key in keys if getattr(norm, key) is not None}
