from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import rankopt
from rankopt._merging.bottlenecks import find_bottlenecks
from rankopt.vision import import_torchvision


def chain(*between, groups=1, first=None, last=None):
    """1x1 16→8, 3x3 8→8, 1x1 8→16, with modules after the first and the second."""
    parts = [list(part) for part in (between or ((), ()))]
    return nn.Sequential(
        first or nn.Conv2d(16, 8, 1),
        *parts[0],
        nn.Conv2d(8, 8, 3, padding=1, groups=groups),
        *parts[1],
        last or nn.Conv2d(8, 16, 1),
    )


def only(model):
    (found,) = find_bottlenecks(model)
    return found


def test_reads_norms_and_activations():
    model = chain((nn.BatchNorm2d(8), nn.SiLU()), (nn.ReLU(),))
    found = only(model)
    assert found.refusal is None
    assert found.targets == ("0", "3", "5")
    assert found.norms == ("1", None)
    assert found.widths == (8, 8)
    x = torch.randn(2, 8, 4, 4)
    modules = dict(model.named_modules())
    assert torch.equal(found.activations[0](modules, x), F.silu(x))
    assert torch.equal(found.activations[1](modules, x), F.relu(x))


def test_functional_activations_and_methods():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1)

        def forward(self, x):
            return x[:, :, 1:-1, 1:-1] + self.c(F.leaky_relu(self.b(self.a(x).relu()), 0.2))

    found = only(Net())
    assert found.refusal is None
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(found.activations[0]({}, x), x.relu())
    assert torch.equal(found.activations[1]({}, x), F.leaky_relu(x, 0.2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (chain(groups=8), "depthwise"),
        (chain((nn.GroupNorm(2, 8),), ()), "GroupNorm 1 lies between"),
        (chain((nn.ReLU(), nn.BatchNorm2d(8)), ()), "BatchNorm2d 2 lies between"),
        (chain((nn.PReLU(8),), ()), "PReLU 1 lies between"),
        (chain((nn.MaxPool2d(2),), ()), "MaxPool2d 1 lies between"),
        (chain(first=nn.Conv2d(16, 8, 1, groups=2)), "0 has 2 groups"),
        (chain(last=nn.Conv2d(8, 16, 1, padding=1)), "2 pads its input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_with_a_reason(model, reason):
    assert reason in only(model).refusal


def test_refuses_values_and_layers_used_elsewhere():
    class Net(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1)
            self.shared = shared

        def forward(self, x):
            inner = self.b(self.a(x))
            out = self.c(inner)
            return (out, self.a(out)) if self.shared else (out, inner.mean())

    assert "a is called several times" in only(Net(True)).refusal
    assert "the output of Conv2d b is used elsewhere" in only(Net(False)).refusal


def attachments():
    hooked = chain((nn.BatchNorm2d(8),), ())
    hooked[1].register_forward_hook(lambda *_: None)
    patched = chain((nn.ReLU(),), ())
    patched[1].forward = torch.sigmoid
    tied = chain((nn.BatchNorm2d(8),), (nn.BatchNorm2d(8),))
    tied[1].bias = tied[3].bias
    normed = chain()
    parametrizations.weight_norm(normed[1])
    return [
        (hooked, "BatchNorm2d 1: hooks are attached"),
        (patched, "ReLU 1: its forward is patched"),
        (tied, "BatchNorm2d 1 shares its parameters with 3"),
        (normed, "1: ParametrizedConv2d is a subclass"),
    ]


@pytest.mark.parametrize(("model", "reason"), attachments())
def test_refuses_what_would_be_lost(model, reason):
    assert reason in only(model).refusal


def test_traces_the_parts_of_what_fx_cannot_trace():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(chain(), nn.ReLU(), chain())

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else x

    found = find_bottlenecks(Net())
    assert [b.targets for b in found] == [
        ("body.0.0", "body.0.1", "body.0.2"),
        ("body.2.0", "body.2.1", "body.2.2"),
    ]


def test_leaves_the_model_and_generators_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = chain(), 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) + torch.rand(1)

    model, state = Net(), torch.get_rng_state()
    assert len(find_bottlenecks(torch.compile(model, backend="eager"))) == 1
    assert model.calls == 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "count", "free"),
    [
        ("resnet50", 16, 16),
        ("resnext50_32x4d", 16, 16),
        ("regnet_x_400mf", 22, 22),
        ("mobilenet_v2", 16, 0),
        ("densenet121", None, 0),
        ("resnet18", 0, 0),
    ],
)
def test_torchvision(name, count, free):
    found = find_bottlenecks(import_torchvision().models.get_model(name, weights=None))
    assert count is None or len(found) == count
    assert sum(block.refusal is None for block in found) == free


def test_blocks_that_share_a_convolution():
    """1x1, 3x3, 1x1, 3x3, 1x1, as in detectors' necks: the first of the two can be merged."""
    sizes = [(32, 16, 1), (16, 32, 3), (32, 16, 1), (16, 32, 3), (32, 16, 1)]
    convs = [nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in sizes]
    model = nn.Sequential(*convs)
    first, second = find_bottlenecks(model)
    assert first.refusal is None
    assert second.refusal == "shares 2 with the bottleneck at 1"
    plan = rankopt.merge_plan(model, ratio=0.5)
    assert [d.targets for d in plan.changes] == [("0", "1", "2")]
    x = torch.randn(1, 32, 8, 8)
    assert rankopt.apply(model, plan)(x).shape == model(x).shape
