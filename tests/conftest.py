"""Conditions of every test: a seed of its own, and memory that is NaN until it is written."""

import os
import zlib

import hypothesis.core
import pytest
import torch
from hypothesis import HealthCheck, settings

from .references import poisoned

# Triton decides on import whether it interprets, so its tests want the variable from the start:
# TRITON_INTERPRET=1 pytest tests/triton (make test-kernels).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]

# The same examples in every run. HUT_SEED=<number> draws others, here and in every other test.
_SHIFT = int(os.environ.get("HUT_SEED", "0"))
settings.register_profile(
    "hut",
    derandomize=_SHIFT == 0,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("hut")
if _SHIFT:
    hypothesis.core.global_force_seed = _SHIFT  # what --hypothesis-seed sets


def seed_of(nodeid: str) -> int:
    """A test's seed: its name's checksum, moved by HUT_SEED."""
    return (zlib.crc32(nodeid.encode()) + _SHIFT) % 2**32


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(seed_of(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        line = f"torch.manual_seed({seed_of(item.nodeid)}); HUT_SEED={_SHIFT}"
        report.sections.append(("seed of this test", line))
    return report


@pytest.fixture(autouse=True, scope="session")
def _unwritten_memory_is_nan():
    """An output that nobody wrote cannot pass for a right one."""
    with poisoned():
        yield
