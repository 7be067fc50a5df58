"""What several test files share."""

from __future__ import annotations

import pytest
import torch

from benchmarks import convergence
from ddim_ode import NoiseSchedule


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """States of a few numbers gain nothing from threads, and timings of the suite then mean something."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    """The paper's schedule."""
    return NoiseSchedule.linear()


@pytest.fixture(scope="session")
def problems() -> dict[str, convergence.Problem]:
    """The problems of the convergence study, solved once a session."""
    return {name: make() for name, make in convergence.PROBLEMS.items()}
