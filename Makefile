# On a fresh machine, `make demo` trains a network and shows the result, and `make test` runs the
# tests. Both create .venv first, with PYTHON (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
# one worker per core: tests often wait for processes that they start
PARALLEL := --numprocesses auto --maxprocesses 4

.PHONY: demo demo-points demo-detection demo-segmentation web test test-slow test-faults test-web test-clients dense test-dense lint format setup clean

demo: setup
	$(BIN)/python -m tools.demo

demo-points: setup
	$(BIN)/python -m tools.demo_points

demo-detection demo-segmentation: demo-%: dense
	$(BIN)/python -m tools.demo_dense $*

# a web page to try a classifier on: make web CHECKPOINT=runs/mine/checkpoint-best.pth; by default that of the newest
# finished demo, which has a report
CHECKPOINT ?= $(patsubst %report.html,%checkpoint-best.pth,$(shell ls -t runs/demo-*/report.html 2>/dev/null | head -1))
web: .venv/.web $(if $(CHECKPOINT),,demo)
	$(BIN)/python -m tools.web --checkpoint "$(CHECKPOINT)"

.venv/.web: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[web]'
	touch $@

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: setup
	$(BIN)/python -m pytest $(PARALLEL) --dist loadfile -m slow

# adds the mm stack, for detection and segmentation
dense: setup
	tools/install_dense.sh

test-dense: dense
	$(BIN)/python -m pytest $(PARALLEL) -m dense tests/dense

# the web page in Chromium, if it is installed
test-web: .venv/.web
	$(BIN)/python -m pytest -m "slow or not slow" tests/integration/test_web.py

# runs exported files in other programs, which are installed beside .venv (1.8 GB)
test-clients: build/clients/.installed
	build/clients/venv/bin/python -m pytest $(PARALLEL) -m slow tests/clients

build/clients/.installed: pyproject.toml tests/clients/install.sh examples/web/package.json | setup
	tests/clients/install.sh
	touch $@

# kills runs at random moments and compares their results; then other faults (about half an hour)
test-faults: setup
	$(BIN)/python -m tests.faults --kills 50
	$(BIN)/python -m pytest -v -m "slow or not slow" $(addprefix tests/integration/test_,survive.py slurm.py evaluation.py hostile.py)

# import-linter reads packages only, so each top-level module is linked as a package
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	rm -rf build/imports
	for module in *.py; do mkdir -p build/imports/$${module%.py}; ln -s $(CURDIR)/$$module build/imports/$${module%.py}/__init__.py; done
	for package in */__init__.py; do ln -s $(CURDIR)/$${package%/*} build/imports; done
	cd build/imports && $(CURDIR)/$(BIN)/lint-imports --no-logo $(CURDIR)/pyproject.toml

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/.installed

# the mark is written last, so that an interrupted installation starts again
.venv/.installed: pyproject.toml
	@echo "installing into .venv (7 GB): takes a few minutes and prints nothing"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,data,fast,points,tiff,export,openvino,wandb,dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info build
