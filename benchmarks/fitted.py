"""Output errors of decomposed convolutions of ResNet-20, and what they are on other images.

Run: python -m benchmarks.fitted
Needs the development data (see `benchmarks.cifar.data_folder`). Factors are fitted to unlabelled
training images; every error is that of the layer's output on 512 others, relative to it.
  methods   each at about the same MACs
  images    factors that follow the moments of whole patches or only those of the channels, the
            last factor aside, for fewer and fewer images
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.cifar import images, resnet20
from rankopt import CP, TT, BranchedTucker, Decomposition, DepthwiseSeparable, SpatialSVD, Tucker2
from rankopt._calibration.collect import collect
from rankopt._calibration.moments import Moments
from rankopt._decompositions.rebuild import rebuild
from rankopt._model.layers import Layer, canonical_weight, find_layers
from rankopt._model.probe import probe
from rankopt._utils.tables import table, to_text

METHODS = (Tucker2(), SpatialSVD(), BranchedTucker(), TT(), CP(), DepthwiseSeparable())
STRIDED = ("layer2.0.conv1", "layer3.0.conv1")
LAYERS = ("layer1.1.conv2", *STRIDED, "layer2.1.conv2", "layer3.1.conv2", "layer3.2.conv2")
COUNTS = (4, 16, 64, 512)
SHARE = 0.3


def lost(gap: Tensor, weight: Tensor, moments: Moments) -> float:
    """‖(W − Ŵ)x‖/‖Wx‖ over the inputs that the moments are of."""
    outputs = [moments.output(w.flatten(2)).diagonal(dim1=-2, dim2=-1) for w in (gap, weight)]
    gap_energy, energy = (float(diagonal.sum()) for diagonal in outputs)
    return math.sqrt(gap_energy / energy)


def ranks_for(method: Decomposition, layer: Layer, share: float) -> tuple[int, ...]:
    """Equal shares of every rank's maximum, as large as this share of the MACs allows."""
    axes = method.rank_axes(layer)
    best = tuple(axis.step for axis in axes)
    for part in torch.linspace(0, 1, 1025).tolist():
        ranks = tuple(max(1, int(part * axis.maximum / axis.step)) * axis.step for axis in axes)
        if method.macs(layer, ranks) <= share * (layer.macs or 0):
            best = max(best, ranks)
    return best


def unseen_error(
    method: Decomposition, layer: Layer, weight: Tensor, ranks: Any, seen: Moments, other: Moments
) -> float:
    factors = method.prepare(weight, seen).factors(ranks)
    made = rebuild(method, layer, ranks, {name: f.double() for name, f in factors.items()})
    return lost(weight.double() - made, weight.double(), other)


def main() -> None:
    model = resnet20()
    x, _ = images("train", 0, 110)
    found = find_layers(model)
    layers = {layer.name: layer for layer in probe(model, found, x[:1]).annotate(found)}
    chosen = [layers[name] for name in LAYERS]
    weights = {name: canonical_weight(model.get_submodule(name)) for name in LAYERS}

    def moments(part: Tensor) -> dict[str, Moments]:
        return collect(model, chosen, list(part.split(64)), progress=False)

    other = moments(x[512:1024])
    every = {count: moments(x[:count]) for count in COUNTS}
    names = [method.name for method in METHODS]
    made = table(f"error at no more than {SHARE:.0%} of the MACs", "layer", *names)
    for layer in chosen:
        cells = []
        for method in METHODS:
            ranks = ranks_for(method, layer, SHARE)
            error = unseen_error(
                method, layer, weights[layer.name], ranks, every[512][layer.name], other[layer.name]
            )
            share = method.macs(layer, ranks) / (layer.macs or 1)
            cells.append(f"{error:.3f} ({share:.0%})")
        made.add_row(layer.name, *cells)
    print(to_text(made))

    made = table(
        "error with the channels' moments → the patches'",
        "layer", "images", "positions per entry", *names,
    )  # fmt: skip
    for layer in chosen:
        for count in COUNTS:
            known = every[count][layer.name]
            cells = []
            for method in METHODS:
                ranks = ranks_for(method, layer, SHARE)
                errors = [
                    unseen_error(
                        method,
                        layer,
                        weights[layer.name],
                        ranks,
                        Moments(known.second, known.pixels, positions, known.mean),
                        other[layer.name],
                    )
                    for positions in (0, 10**9)
                ]
                cells.append(f"{errors[0]:.3f} → {errors[1]:.3f}")
            ratio = known.count / known.shape[-1]
            made.add_row(layer.name, str(count), f"{ratio:.1f}", *cells)
    print(to_text(made))


if __name__ == "__main__":
    main()
