"""Options of the benchmark suite."""

import os
from pathlib import Path

import pytest
import torch

from bench.deadline import Deadline

FULL_MINUTES = 8.0  # on a GPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case instead of the quick ones")
    parser.addoption("--minutes", type=float, help="skip cases that would begin later; --full on a GPU: 8 unless given")
    parser.addoption("--records", type=Path, help="file that gets each result at once, one JSON record a line")


def pytest_configure(config: pytest.Config) -> None:
    # Fixed, and all there are: whatever ran before in this process may have set another number.
    torch.set_num_threads(os.cpu_count() or 1)
    minutes = config.getoption("minutes")
    if minutes is None and config.getoption("full") and torch.cuda.is_available():
        minutes = FULL_MINUTES
    if minutes is not None:
        config.pluginmanager.register(Deadline(60 * minutes))
    if (path := config.getoption("records")) is not None:
        path.unlink(missing_ok=True)
    # Other libraries' deprecations are none of ours.
    config.addinivalue_line("filterwarnings", "default")
