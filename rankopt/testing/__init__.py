"""The contracts, as importable tests for built-in and third-party plug-ins.

```python
from rankopt.testing import check_strategy, strategy_checks

def test_mine():
    check_strategy(MyStrategy())

@pytest.mark.parametrize("check", strategy_checks(MyStrategy()), ids=str)
def test_each(check):
    check()
```
"""

from __future__ import annotations

from rankopt._timing.modelled_clock import ModelledClock, Operations
from rankopt.testing.check import Check
from rankopt.testing.decomposition import check_decomposition, decomposition_checks, dense_weight
from rankopt.testing.planted import planted_inputs, planted_model
from rankopt.testing.strategy import check_strategy, squared_error, strategy_checks

__all__ = [
    "Check",
    "ModelledClock",
    "Operations",
    "check_decomposition",
    "check_strategy",
    "decomposition_checks",
    "dense_weight",
    "planted_inputs",
    "planted_model",
    "squared_error",
    "strategy_checks",
]
