"""Faults for tests/sabotage.py, one module for each script and one for common/."""

from faults import common, datadream, distdiff, gafi, realfake, synthetic_recognition
from faults.fault import Fault

__all__ = ["FAULTS", "Fault"]

FAULTS = {}
for module in (datadream, realfake, synthetic_recognition, gafi, distdiff, common):
    FAULTS |= module.FAULTS
