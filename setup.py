"""Everything is declared in pyproject.toml; this file is where native extensions will be built."""

from setuptools import setup

setup()
