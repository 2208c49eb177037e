"""Getting accuracy back by training: freezing schedules, distillation, the training loop."""

from rankopt.training.distillation import Distillation, Distiller
from rankopt.training.freezing import FixedFreezing, Freezer, SequentialFreezing
from rankopt.training.schedules import FREEZING, Fixed, NoFreezing, Schedule, Sequential

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
