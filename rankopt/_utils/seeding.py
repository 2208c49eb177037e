"""One seed for every generator that a user's code may draw from."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["seed_all"]


def seed_all(seed: int) -> None:
    """Seed torch, Python and NumPy, which takes 32 bits of it."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
