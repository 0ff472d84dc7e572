"""Profiles of hypothesis, and what every test starts from.

METALLOID_TEST_PROFILE picks how long to look: "quick" (sanitizers), "ci" (default; the same examples every time) or
"thorough". METALLOID_TEST_WITHOUT names libraries that the tests are to find missing, METALLOID_TEST_PACKAGE the folder
that the package has to come from.
"""

import os
import sys
from pathlib import Path

if "METALLOID_TEST_WITHOUT" in os.environ:
    sys.modules.update(dict.fromkeys(os.environ["METALLOID_TEST_WITHOUT"].split()))
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each: else the threads of NumPy and PyTorch wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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

assert metalloid.__file__.startswith(os.environ.get("METALLOID_TEST_PACKAGE", "")), metalloid.__file__


def pytest_report_header():
    profile = os.environ.get("METALLOID_TEST_PROFILE", "ci")
    return f"metalloid {metalloid.__version__}, {metalloid.get_num_threads()} threads, hypothesis profile {profile}"


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The cache of custom kernels: this run's own, empty at first, one for all of its processes."""
    run = tmp_path_factory.getbasetemp()
    path = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "kernels"
    path.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALLOID_CACHE", str(path))
        yield path


@pytest.fixture
def threads():
    """Sets the process's thread count for one test."""
    yield metalloid.set_num_threads
    metalloid.set_num_threads(0)
