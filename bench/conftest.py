"""Options of the benchmark suite."""

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case instead of the quick ones")
    parser.addoption("--records", type=Path, help="file that gets each result at once, one JSON record a line")


def pytest_configure(config: pytest.Config) -> None:
    # Fixed, and all there are: whatever ran before in this process may have set another number.
    torch.set_num_threads(os.cpu_count() or 1)
    if (path := config.getoption("records")) is not None:
        path.unlink(missing_ok=True)
    # Other libraries' deprecations are none of ours.
    config.addinivalue_line("filterwarnings", "default")
