from __future__ import annotations

import pytest
import torch

from rankopt.vision import import_torchvision

# transformers imports torchvision, so the repair has to come first.
import_torchvision()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
