"""rankopt's own strategies, registered through the same entry points as anyone's."""

from typing import TYPE_CHECKING, Any

from rankopt_strategies.energy import Energy
from rankopt_strategies.knapsack import Knapsack
from rankopt_strategies.parameter_ratio import ParameterRatio
from rankopt_strategies.profiled import Profiled
from rankopt_strategies.relaxed import Relaxed, RelaxedSettings
from rankopt_strategies.vbmf import VBMF

if TYPE_CHECKING:
    from rankopt_strategies.optuna_search import OptunaSearch

__all__ = [
    "VBMF",
    "Energy",
    "Knapsack",
    "OptunaSearch",
    "ParameterRatio",
    "Profiled",
    "Relaxed",
    "RelaxedSettings",
]


def __getattr__(name: str) -> Any:
    if name == "OptunaSearch":  # optuna is imported only for it
        from rankopt_strategies.optuna_search import OptunaSearch

        return OptunaSearch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
