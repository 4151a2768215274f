# Two commands do everything from a fresh checkout: `make demo` and `make test`.
PYTHON ?= python3
# A CPU build is enough. learn2learn, which the tests use, needs the torchvision of the same release.
# For another build, e.g. CUDA: make test TORCH="torch torchvision --index-url ..."
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.PHONY: demo quick-demo quick-study docs test slow-test lint environments clean

# The stamp is written last, so an interrupted installation is repeated.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

# learn2learn 0.2.0 has no wheels, and its C files do not compile on Python 3.11 and newer. It is built
# from its .pyx files.
.venv/learn2learn: .venv/installed
	$(BIN)/pip install --quiet cython setuptools wheel
	$(BIN)/pip install --quiet --no-build-isolation --config-settings="--global-option=build_ext" \
		learn2learn==0.2.0
	touch $@

demo: .venv/installed
	$(BIN)/prism-meta demo --out demo

quick-demo: .venv/installed
	rm -rf demo-quick
	$(BIN)/prism-meta demo --quick --out demo-quick

# A whole study in its smallest form.
quick-study: .venv/installed
	rm -rf quick-study
	$(BIN)/prism-meta ablate benchmarks/ablation/quick.toml --out quick-study

# The site of the documentation, which opens from its folder.
docs: .venv/learn2learn
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: .venv/learn2learn
	$(BIN)/pytest -n auto -m "not slow"

# Kills, full disks, several processes, and other enumerations that take minutes.
slow-test: .venv/learn2learn
	$(BIN)/pytest -n auto -m slow

lint: .venv/learn2learn
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Installs the wheel with the lowest and the newest versions of all dependencies; see tools/clean_environments.py.
environments: .venv/installed
	$(BIN)/python tools/clean_environments.py build/environments

clean:
	rm -rf .venv demo demo-quick quick-study build dist
