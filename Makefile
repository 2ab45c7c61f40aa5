# Two commands on a fresh machine: `make demo` trains a network and shows the result, `make test`
# passes the tests. Both make .venv first, with PYTHON (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
# tests wait for processes that they start: a worker a core
PARALLEL := --numprocesses auto --maxprocesses 4

.PHONY: demo demo-detection demo-segmentation test test-slow test-faults dense test-dense lint format setup clean

demo: setup
	$(BIN)/python -m tools.demo

demo-detection demo-segmentation: demo-%: dense
	$(BIN)/python -m tools.demo_dense $*

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: setup
	$(BIN)/python -m pytest -m slow

# what detection and segmentation need beside the rest
dense: setup
	tools/install_dense.sh

test-dense: dense
	$(BIN)/python -m pytest -m dense tests/dense

# kills runs at random moments and compares what comes of them; then every other fault (about half an hour)
test-faults: setup
	$(BIN)/python -m tests.faults --kills 50
	$(BIN)/python -m pytest -v -m "slow or not slow" $(addprefix tests/integration/test_,survive.py slurm.py evaluation.py hostile.py)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/.installed

# the mark is written last, so that an installation that was cut off starts again
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,data,fast,export,openvino,wandb,dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info build
