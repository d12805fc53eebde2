# Each target sets up what it needs: a virtual environment in .venv, the dependencies, the package.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

# Other libraries, to compare with: the constraints say which versions; what they need beyond torch they do not use here.
PEERS := bayesian-torch torchbnn blitz-bayesian-pytorch torch-uncertainty
RECORDS := .benchmarks/quick.jsonl

.PHONY: demo test audit lint bench bench-compare sanitize clean

# torch comes first and by its exact version, which finds a CPU build where there is one.
.venv/installed: constraints.txt pyproject.toml setup.py kernels/cpu/fused.cpp $(wildcard kernels/cpu/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	touch $@

demo: .venv/installed
	$(BIN)/python examples/digits.py

test: .venv/peers
	$(BIN)/pytest -n $(WORKERS) -m "not audit"

audit: .venv/installed
	$(BIN)/pytest -m audit tests/test_audit.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/peers: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt $(PEERS)
	touch $@

# A wrong answer shows in the log, and gets no number; the others get theirs.
$(RECORDS): .venv/peers FORCE
	mkdir -p $(@D)
	$(BIN)/pytest bench -q --records $@ > $(@D)/log || grep -E "no number|Error" $(@D)/log

bench: $(RECORDS)
	$(BIN)/python -m bench.report $(RECORDS) --save quick

# Against the committed results of this device.
bench-compare: $(RECORDS)
	git show "HEAD:$$($(BIN)/python -m bench.report --where)/quick.json" > .benchmarks/kept.json
	$(BIN)/python -m bench.compare .benchmarks/kept.json $(RECORDS)

# The CPU kernel's own tests under the address and undefined behaviour sanitizers, in a copy of the tree.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g
sanitize: .venv/installed
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r fusedbayes kernels tests pyproject.toml setup.py README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/kernels/cpu/libfused.so.1
	cd $(SANITIZED) && CFLAGS="$(SANITIZERS)" CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		../../$(BIN)/python setup.py -q build_ext --inplace
	nm $(SANITIZED)/kernels/cpu/libfused.so.1 | grep -q __asan_report
	nm $(SANITIZED)/kernels/cpu/libfused.so.1 | grep -q __ubsan_handle
	cd $(SANITIZED) && LD_PRELOAD=$$(cc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
		../../$(BIN)/python -m pytest tests/test_kernels_cpu*.py

FORCE:

clean:
	rm -rf .venv build *.egg-info kernels/cpu/libfused.so.1
