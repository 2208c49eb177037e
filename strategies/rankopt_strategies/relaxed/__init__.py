"""`relaxed`: ranks as continuous, learnable quantities, held at the budget (arXiv 2409.03555)."""

from rankopt_strategies.relaxed.paper import RelaxedSettings
from rankopt_strategies.relaxed.strategy import Relaxed

__all__ = ["Relaxed", "RelaxedSettings"]
