from __future__ import annotations

import torch

from rankopt import moments
from rankopt.moments import Moments


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
