"""Profiles of hypothesis, and what every test starts from.

METALLOID_TEST_PROFILE picks how long to look: "quick" (sanitizers), "ci" (default; the same examples every time) or
"thorough".
"""

import os
from pathlib import Path

# Before JAX is imported: a CPU of four devices. What metalloid.mlx compiles goes where the build's files are.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
if (Path(__file__).parents[2] / "CMakeLists.txt").exists():
    os.environ.setdefault("XDG_CACHE_HOME", str(Path(__file__).parents[2] / "build" / "cache"))

import metalloid
import pytest
from hypothesis import HealthCheck, Phase, settings

COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=60, derandomize=True, database=None, **COMMON)
settings.register_profile(
    "quick", parent=settings.get_profile("ci"), max_examples=12, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("METALLOID_TEST_PROFILE", "ci"))


def pytest_report_header():
    profile = os.environ.get("METALLOID_TEST_PROFILE", "ci")
    return f"metalloid {metalloid.__version__}, {metalloid.get_num_threads()} threads, hypothesis profile {profile}"


@pytest.fixture
def threads():
    """Sets the process's thread count for one test."""
    yield metalloid.set_num_threads
    metalloid.set_num_threads(0)
