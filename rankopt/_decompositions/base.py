"""The contract of a decomposition, and the module-building helpers all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions.projection import Projection
from rankopt._model.layers import Layer
from rankopt._model.measure import no_autocast
from rankopt.errors import LayerError

__all__ = ["Basis", "Decomposition", "IntArray", "RankAxis", "chain", "conv", "made_by"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
# Up to this many channels float64 costs next to nothing.
FLOAT64_SIZE: Final = 128
# Squares of smaller weights, and of larger ones than its inverse, leave float32.
SMALL: Final = 1e-15
# Methods of a basis that multiply matrices.
_COMPUTING: Final = {"spectra", "error", "fitted_error", "factors", "projection", "fitting"}
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class RankAxis:
    """One rank of a decomposition: its name and the largest useful value.

    Args:
        name: What the rank counts.
        maximum: Largest useful value, a multiple of `step`.
        step: Feasible ranks are its multiples.
        width: Channels of the chain that one rank stands for; a `round_to` is of channels.
    """

    name: str
    maximum: int
    step: int = 1
    width: int = 1


class Basis(ABC):
    """What is computed once per layer, from which every rank follows.

    Its methods run outside of any `torch.autocast` of the caller's, which would round the
    factors to half precision.

    Attributes:
        weight: The canonical weight; None while the basis lies in a cache.
    """

    weight: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _COMPUTING & vars(cls).keys():
            found = vars(cls)[name]
            if isinstance(found, property) and found.fget is not None:
                setattr(cls, name, property(no_autocast()(found.fget)))
            else:
                setattr(cls, name, no_autocast()(found))

    @property
    def spectra(self) -> tuple[FloatArray, ...]:
        """Squared singular values of the unfolding each rank truncates.

        Descending, [groups, size of the mode], one array per rank axis, for
        decompositions that have them (`Decomposition.has_spectra`).
        """
        raise NotImplementedError

    @abstractmethod
    def error(self, ranks: Sequence[Any]) -> Any:
        """Relative Frobenius error ‖W − Ŵ‖/‖W‖ of truncating to `ranks`.

        Args:
            ranks: One entry per axis; integers, or arrays that broadcast
                together, which give an array of errors.
        """

    def fitted_error(self, ranks: Sequence[int]) -> float:
        """Error of the very factors that `factors` gives, fitted if need be."""
        return float(self.error(ranks))

    @abstractmethod
    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        """Factors by parameter name of the chain, ``first.weight`` and so on.

        In order of application: rows of the last one give the layer's outputs.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, the weight itself not counted."""

    def projection(self) -> Projection:
        """The truncation to any mixture of ranks, for decompositions that are `soft`."""
        raise NotImplementedError

    def fitting(self, features: Tensor) -> Tensor:
        """What gives the last factor that suits any weight best, for those that `refit`.

        Args:
            features: What the other factors amount to, [groups, r, C, *kernel].

        Returns:
            G [groups, C·pixels, r]: the last factor of a weight W is W·G.
        """
        raise NotImplementedError

    def release(self) -> None:  # noqa: B027  some hold nothing
        """Give back the matrices that can be computed anew; errors and spectra stay.

        Copies of the basis share both. Another thread may be using them.
        """


@dataclass(frozen=True)
class Decomposition(ABC):
    """One way to write a layer as a chain of smaller layers.

    Subclasses are frozen dataclasses whose fields are the settings of the
    method; a decision stores those that differ from the default beside the ranks.

    Class attributes:
        name: As in plans and the registry.
        roles: Child name in the chain to role: ``first``, ``core`` or ``last``.
        exact_error: Whether `Basis.error` follows in closed form: what the factors of a
            single rank lose, and of several ranks, or of factors that follow the moments of
            patches, an upper bound. Otherwise it is an estimate. `Basis.fitted_error` is the
            truth in any case.
        has_spectra: Whether each rank truncates an unfolding of the weight, so that
            `Basis.spectra` tell what it could lose.
        soft: Whether the basis can mix ranks of a weight that trains, by `Basis.projection`;
            of others, ranks are interpolated between fits at a few.
    """

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, str]]
    exact_error: ClassVar[bool] = True
    has_spectra: ClassVar[bool] = True
    soft: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, layer: Layer) -> str | None:
        """Why the method cannot treat `layer`; None if it can."""

    def applies(self, layer: Layer) -> bool:
        """Whether the method can treat `layer`."""
        return layer.refusal is None and self.refusal(layer) is None

    @abstractmethod
    def rank_axes(self, layer: Layer) -> tuple[RankAxis, ...]:
        """The ranks to choose, input side first; per group for grouped layers."""

    @abstractmethod
    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        """Weight elements of the chain; `ranks` are integers or broadcasting arrays."""

    @abstractmethod
    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        """Multiply-accumulates of the chain for one `example_inputs`."""

    @abstractmethod
    def prepare(self, weight: Tensor, moments: Moments | None = None) -> Basis:
        """Compute the basis of a canonical weight [groups, out, in, *kernel].

        With `moments` errors are relative output errors, ‖(W − Ŵ)S‖/‖WS‖, and
        factors minimise them. Of moments that have a mean, outputs are those less
        their mean, which the bias of the chain then gives.
        """

    @abstractmethod
    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        """The chain with uninitialised weights on the meta device."""

    def factors_kind(self, moments: Moments) -> str:
        """How a plan names factors made with `moments`: see `rankopt.plan.Factors`."""
        return "whitened"

    @property
    def refits(self) -> bool:
        """Whether the last factor follows a weight that trains, by `Basis.fitting`."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        return {
            field.name: value
            for field in fields(self)
            if (value := asdict(self)[field.name]) != field.default
        }

    def check_ranks(self, layer: Layer, ranks: Sequence[int]) -> None:
        """Raise `LayerError` unless there is one feasible rank per axis."""
        axes = self.rank_axes(layer)
        if len(ranks) != len(axes):
            raise LayerError(
                f"layer {layer.name}: {self.name} takes {len(axes)} rank(s) "
                f"({', '.join(axis.name for axis in axes)}), got {list(ranks)}"
            )
        for axis, rank in zip(axes, ranks, strict=True):
            if not 1 <= rank <= axis.maximum:
                raise LayerError(
                    f"layer {layer.name}: {self.name} {axis.name} rank {rank} is outside "
                    f"1 to {axis.maximum}"
                )
            if rank % axis.step:
                raise LayerError(
                    f"layer {layer.name}: {self.name} {axis.name} rank {rank} is not a "
                    f"multiple of {axis.step}"
                )


def conv(
    layer: Layer,
    inputs: int,
    outputs: int,
    *,
    kernel: Sequence[int] | None = None,
    groups: int = 1,
    bias: bool = False,
    place: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A factor of `layer` on the meta device: `nn.Linear` or `nn.ConvNd`.

    Args:
        layer: The layer being replaced.
        inputs: Input channels.
        outputs: Output channels.
        kernel: Kernel size; a single pixel if None.
        groups: Groups of the factor.
        bias: Whether it carries a bias.
        place: Stride, padding, dilation and padding mode, if this factor carries them.
    """
    if not layer.is_conv:
        return nn.Linear(inputs, outputs, bias=bias, device="meta")
    size = tuple(kernel) if kernel is not None else (1,) * len(layer.kernel)
    kind: Any = _CONV[len(size)]
    module: nn.Module = kind(
        inputs, outputs, size, groups=groups, bias=bias, device="meta", **(place or {})
    )
    return module


def geometry(layer: Layer) -> dict[str, Any]:
    """Stride, padding, dilation and padding mode of a convolution, as arguments."""
    return {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }


def side_geometry(layer: Layer, side: int) -> dict[str, Any]:
    """The part of `geometry` that acts along one spatial side, as arguments."""
    place = geometry(layer)
    for key, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
        if not isinstance(place[key], str):
            place[key] = tuple(v if i == side else neutral for i, v in enumerate(place[key]))
    return place


def made_by(method: Decomposition, name: str, args: Mapping[str, Any]) -> bool:
    """Whether a decision's method and arguments are those of `method`, its settings included."""
    settings = {key: value for key, value in args.items() if key != "ranks"}
    return method.name == name and settings == dict(method.settings)


def chain(**factors: nn.Module) -> nn.Sequential:
    """Factors in order of application, as a plain `nn.Sequential` with names."""
    sequence = nn.Sequential()
    for name, module in factors.items():
        sequence.add_module(name, module)
    return sequence


def principal_vectors(gram: Tensor) -> Tensor:
    """Eigenvectors of [groups, n, n] as columns, largest eigenvalue first.

    Signs are fixed by each vector's largest entry, so that results do not
    depend on the LAPACK at hand.
    """
    vectors = torch.linalg.eigh(gram)[1].flip(-1)
    pivots = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    signed: Tensor = vectors * torch.where(pivots < 0, -1.0, 1.0).to(vectors.dtype)
    return signed


def working_copy(weight: Tensor) -> Tensor:
    """`weight` in the precision its factorisation runs in, on the CPU if need be.

    Float64, except for large weights of lower precision: their Gram matrices are
    factorised in float32, which loses only directions below about 3e-4 of the
    largest singular value and halves the time. Energies are measured on the
    projected weight and summed in float64, so stated errors hold either way.
    """
    if weight.dtype == torch.float64 or max(weight.shape[1:3]) <= FLOAT64_SIZE:
        return _doubled(weight)
    largest = float(weight.abs().max())
    if largest and not SMALL <= largest <= 1 / SMALL:  # squares would leave float32's range
        return _doubled(weight)
    return weight.to(torch.float32)


def _doubled(weight: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (weight.cpu() if weight.device.type == "mps" else weight).to(torch.float64)


def energy(tensor: Tensor, dim: Sequence[int]) -> FloatArray:
    """Squares summed over `dim` in float64, as an array on the CPU."""
    summed: FloatArray = tensor.square().sum(dim=tuple(dim), dtype=torch.float64).cpu().numpy()
    return summed


def tails(energies: FloatArray) -> FloatArray:
    """Sums of what follows each entry along the first axis, of positive terms only."""
    sums = np.cumsum(energies[::-1], axis=0)[::-1]
    return np.concatenate([sums[1:], np.zeros_like(sums[:1])])


def positions(layer: Layer) -> tuple[int, int]:
    """(input, output) positions; `LayerError` if the layer was never probed."""
    if layer.positions_in is None or layer.positions_out is None:
        raise LayerError(
            f"layer {layer.name}: its MACs are unknown without example_inputs; pass them"
        )
    return layer.positions_in, layer.positions_out


def positions_between(layer: Layer) -> tuple[int, ...]:
    """Positions after the first spatial side has been convolved, the first two, ..."""
    positions(layer)
    assert layer.positions_between is not None
    return layer.positions_between


def kernel_size(layer: Layer) -> int:
    """Pixels of the kernel; 1 for linear layers."""
    return math.prod(layer.kernel)
