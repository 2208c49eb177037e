"""rankopt's own strategies, registered through the same entry points as anyone's."""

from rankopt_strategies.energy import Energy
from rankopt_strategies.knapsack import Knapsack
from rankopt_strategies.parameter_ratio import ParameterRatio
from rankopt_strategies.profiled import Profiled
from rankopt_strategies.relaxed import Relaxed, RelaxedSettings
from rankopt_strategies.vbmf import VBMF

__all__ = [
    "VBMF",
    "Energy",
    "Knapsack",
    "ParameterRatio",
    "Profiled",
    "Relaxed",
    "RelaxedSettings",
]
