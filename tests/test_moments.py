from __future__ import annotations

import pytest
import torch

from rankopt._calibration import moments
from rankopt._calibration.moments import Moments
from rankopt._decompositions import SpatialSVD, Tucker2


def test_large_moments_lie_on_disk_and_say_the_same(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 12, dtype=torch.float64)
    second = (x.mT @ x).sum(dim=0, keepdim=True)
    weight = torch.randn(1, 5, 12)
    held = Moments(second, 1, 64)
    assert held.nbytes > 0
    monkeypatch.setattr(moments, "SPILL_BYTES", 8 * 12)  # blocks of ten rows
    spilled = Moments(second, 1, 64)
    assert isinstance(spilled._stored, moments.Spilled)
    assert spilled.nbytes == 0
    assert spilled.key == held.key
    for name in ("second", "channels", "channel_root", "damped"):
        for _ in range(2):  # derived, and read again
            assert torch.equal(getattr(spilled, name), getattr(held, name))
    assert torch.allclose(spilled.output(weight), held.output(weight), rtol=1e-12)
    root = held.channel_root
    whitened = weight.double() @ root
    assert torch.allclose(held.output(weight), whitened @ whitened.mT, rtol=1e-9)


def test_error_tables_of_patches():
    """The spectrum of a covariance from either side, for every input rank; zero weights too."""
    torch.manual_seed(0)
    x = torch.randn(1, 200, 12, dtype=torch.float64)
    held = Moments(x.mT @ x / 200, 3, 200)
    basis = Tucker2().prepare(torch.randn(1, 20, 4, 3), held)  # 3, 6, 9 and 12 of 20 outputs
    _, _, predictions = basis._regression()
    total = float(predictions.square().sum())
    for first in range(1, 5):
        values = torch.linalg.svdvals(predictions[..., : 3 * first]).square().cumsum(-1)[0]
        for second in range(1, 13):
            kept = float(values[min(second, len(values)) - 1])
            expected = max(0.0, 1 - kept / total) ** 0.5
            assert float(basis.error([first, second])) == pytest.approx(expected, abs=1e-6)
    held = Moments(torch.eye(36, dtype=torch.float64)[None], 9, 200)
    for method in (Tucker2(), SpatialSVD()):
        ranks = [4] * len(method.prepare(torch.ones(1, 4, 4, 3, 3)).spectra)
        assert float(method.prepare(torch.zeros(1, 4, 4, 3, 3), held).error(ranks)) == 0


def test_moments_stay_in_memory_where_the_disk_is_full(monkeypatch):
    class Full:
        def seek(self, place):
            pass

        def write(self, content):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(moments, "SPILL_BYTES", 8)
    monkeypatch.setattr(moments.tempfile, "TemporaryFile", lambda **_: Full())
    second = torch.eye(4, dtype=torch.float64)[None]
    assert torch.equal(Moments(second, 1, 9).second, second)
