"""Multiply-accumulates of layers that torch computes in one fused call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankopt._model import measure

SAMPLES, STEPS, WIDTH, HIDDEN = 2, 5, 32, 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
def test_lstm(dtype, layers, directions):
    lstm = nn.LSTM(
        WIDTH, HIDDEN, layers, batch_first=True, bidirectional=directions == 2, dtype=dtype
    ).eval()
    first = 4 * HIDDEN * (WIDTH + HIDDEN)
    later = 4 * HIDDEN * (directions * HIDDEN + HIDDEN)
    expected = SAMPLES * STEPS * directions * (first + (layers - 1) * later)
    assert measure.count_macs(lstm, torch.randn(SAMPLES, STEPS, WIDTH, dtype=dtype)) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN is on CUDA only")
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_cudnn(kind, gates):
    layer = kind(WIDTH, HIDDEN, bidirectional=True).cuda().eval()
    expected = 2 * SAMPLES * STEPS * gates * HIDDEN * (WIDTH + HIDDEN)
    x = torch.randn(STEPS, SAMPLES, WIDTH, device="cuda")
    assert measure.count_macs(layer, x) == expected


def test_bilinear():
    inputs = torch.randn(3, 8), torch.randn(3, 7)
    assert measure.count_macs(nn.Bilinear(8, 7, 4), inputs) == 3 * 8 * 7 * 4
