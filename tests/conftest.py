from __future__ import annotations

import os

import pytest
import torch

from rankopt.vision import import_torchvision

# transformers imports torchvision, so the repair has to come first.
import_torchvision()


if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each worker
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKOPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
