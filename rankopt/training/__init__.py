"""Getting accuracy back by training: freezing schedules, distillation, the training loop."""

from rankopt.training.distillation import Distillation, Distiller
from rankopt.training.freezing import (
    FREEZING,
    Fixed,
    FixedFreezing,
    Freezer,
    NoFreezing,
    Schedule,
    Sequential,
    SequentialFreezing,
)

__all__ = [
    "FREEZING",
    "Distillation",
    "Distiller",
    "Fixed",
    "FixedFreezing",
    "Freezer",
    "NoFreezing",
    "Schedule",
    "Sequential",
    "SequentialFreezing",
]
