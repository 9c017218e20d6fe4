# make demo   the environment, and the main job on real input: about a minute of training
# make test   the environment, and the tests
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RESUME ?=
export OMP_NUM_THREADS ?= 1
# The tests start hundreds of processes: without its bytecode each would compile loopkit again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test long lint types docs bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m tasks.charlm $(if $(RESUME),--resume $(RESUME))

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

long: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m long --timeout=3000 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict
	@echo "docs: site/index.html"

# Beside the peers, in turns, on a machine with nothing else to do; as root for the small disk.
# What has a goal comes first.
bench: $(VENV)/.bench
	for name in overhead progress throughput strategies evaluation start import_time checkpoint prediction counts \
	  reliability; do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; \
	done

$(VENV)/bin/python:
	@echo "== making the environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing loopkit (torch among it: a few minutes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[plots]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing loopkit and what its development needs (torch among it: a few minutes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
