"""Studies: Optuna on the real metric, resumable, over as many workers as there are."""

from rankopt._study.devices import Device, claim_device
from rankopt._study.entry import study
from rankopt._study.opening import open_study
from rankopt._study.records import Point
from rankopt._study.study import Study

__all__ = ["Device", "Point", "Study", "claim_device", "open_study", "study"]
