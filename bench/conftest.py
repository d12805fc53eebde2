"""Options of the benchmark suite."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case instead of the quick ones")
    parser.addoption("--records", type=Path, help="file to which each result is appended, one JSON record a line")


def pytest_configure(config: pytest.Config) -> None:
    # Other libraries' deprecations are none of ours.
    config.addinivalue_line("filterwarnings", "default")
