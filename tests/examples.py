"""How hypothesis makes examples here: the same in each run, however long one of them takes.

A process may have to wait for its CPU for longer than any deadline of an example. Inputs that are
new are what the programs in tests/fuzz look for.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tests",
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")
