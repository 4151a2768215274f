# Two commands do everything from a fresh checkout: `make demo` and `make test`.
PYTHON ?= python3
# A CPU build is enough; another one, e.g. for CUDA: make test TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo quick-demo test lint clean

# The stamp is written last, so that an installation that was cut off is made again.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: .venv/installed
	$(BIN)/prism-meta demo --out demo

quick-demo: .venv/installed
	rm -rf demo-quick
	$(BIN)/prism-meta demo --quick --out demo-quick

test: .venv/installed
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv demo demo-quick
