"""A time limit for a pytest run."""

import time

import pytest


class Deadline:
    """A pytest plugin that skips what would begin later than so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.end:
            pytest.skip(f"out of time for {item.name}")
