# Each target sets up what it needs: a virtual environment in .venv, the dependencies, the package.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test lint clean

# torch comes first and by its exact version, which finds a CPU build where there is one.
.venv/installed: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	touch $@

demo: .venv/installed
	$(BIN)/python examples/digits.py

test: .venv/installed
	$(BIN)/pytest -n $(WORKERS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
