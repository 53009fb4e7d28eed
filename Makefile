# Two commands on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test check bench bench-seeds bench-presets bench-query-side bench-classes bench-mutual bench-inheritance bench-pruning bench-runtime bench-service bench-sweep bars clean

demo: $(VENV)/.demo
	$(BIN)/clipdistill demo --json

test: $(VENV)/.dev
	$(BIN)/pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/demo.py

bench-seeds: $(VENV)/.dev
	$(BIN)/python benchmarks/demo_seeds.py

bench-presets: $(VENV)/.dev
	$(BIN)/python benchmarks/presets.py --jobs 2

bench-query-side: $(VENV)/.dev
	$(BIN)/python benchmarks/query_side.py

bench-classes: $(VENV)/.dev
	$(BIN)/python benchmarks/classification.py

bench-mutual: $(VENV)/.dev
	$(BIN)/python benchmarks/mutual.py

bench-pruning: $(VENV)/.dev
	$(BIN)/python benchmarks/pruning.py

bench-compression: $(VENV)/.dev
	$(BIN)/python benchmarks/compression_budget.py

bench-inheritance: $(VENV)/.dev
	$(BIN)/python benchmarks/inheritance.py --jobs 2

bench-runtime: $(VENV)/.dev
	$(BIN)/python benchmarks/runtime.py

bench-service: $(VENV)/.dev
	$(BIN)/python benchmarks/service.py

bench-sweep: $(VENV)/.dev
	$(BIN)/python benchmarks/sweep.py

bars: $(VENV)/.dev
	$(BIN)/python benchmarks/bars.py

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	-$(BIN)/python -m clipdistill.formats.web_vendor 120  # of npm; without it the tests of web bundles are skipped
	touch $@ $(VENV)/.demo
