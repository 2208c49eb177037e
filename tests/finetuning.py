"""A small fine-tuning problem, and states of models compared."""

from __future__ import annotations

import copy
import functools

import torch

import rankopt
from rankopt.testing import planted_model


@functools.cache
def _problem(count):
    teacher = planted_model(noise=0.5)
    x = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = teacher(x).argmax(dim=1)
    plan = rankopt.search(teacher, "params<=25%", strategy="parameter_ratio")
    return teacher, rankopt.apply(teacher, plan), x, y


def problem(count=192):
    """A dense teacher, its compressed model, and inputs labelled by the teacher."""
    return copy.deepcopy(_problem(count))


def in_batches(x, y, size=32):
    return list(zip(x.split(size), y.split(size), strict=True))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
