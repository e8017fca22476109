# make run: installs everything and runs a whole search.  make test, make lint: the checks of CI.
# make test-cluster, as root and on Linux: tests in which whole machines are killed, and nodes join and leave.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/quickstart
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')

.PHONY: run setup test test-faults test-cluster lint format benchmarks gpu-wheels clean
.DELETE_ON_ERROR:

run: setup
	$(BIN)/gross run --preset quickstart --out $(RUN)

setup: .venv/installed

# Rebuilt only when the project's requirements change.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gross_ray needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The tests of pipelines/execution start Ray on all cores, so they run one after another, also if other tests failed.
test: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --ignore tests/pipelines/execution; first=$$?; \
		$(BIN)/python -m pytest tests/pipelines/execution && exit $$first

# Runs each cell of the table in docs/reliability.md twice (or GROSS_RAY_FAULT_REPEATS times), at random moments;
# GROSS_RAY_FAULT_SEED repeats the moments of an earlier run.
test-faults: setup
	seed=$${GROSS_RAY_FAULT_SEED:-$$(date +%s)}; echo "GROSS_RAY_FAULT_SEED=$$seed"; \
		GROSS_RAY_FAULT_SEED=$$seed GROSS_RAY_FAULT_REPEATS=$${GROSS_RAY_FAULT_REPEATS:-2} \
		$(BIN)/python -m pytest -m 'faults or quick_fault' -v tests/pipelines

test-cluster: setup
	@command -v ip >/dev/null || { echo "no program ip: install iproute2" >&2; exit 1; }
	@test "$$(id -u)" = 0 || { echo "namespaces need root: sudo make test-cluster" >&2; exit 1; }
	$(BIN)/python -m pytest -m cluster

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What benchmarks/on_gpu.py needs on a machine without a network, besides this folder: CIFAR-10, as Parquet. No wheel: all
# packages that it imports are there, or are imported only where they are used.
DATA ?= ../shared/data/cifar10-jpeg
gpu-wheels:
	mkdir -p .gpu/cifar10
	cp $(DATA)/*.parquet .gpu/cifar10/

benchmarks: setup
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/search_on_ray.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/supernet.py
	$(BIN)/python benchmarks/strategies.py
	$(BIN)/python benchmarks/scores.py
	$(BIN)/python benchmarks/decomposition.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/commands.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
