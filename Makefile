# Each target first creates what it needs: .venv, with PYTHON (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
# one worker per core: tests often wait for processes that they start
PARALLEL := --numprocesses auto --maxprocesses 4

.PHONY: help demo demo-points demo-detection demo-segmentation web test test-slow test-faults test-web test-clients dense test-dense lint format setup clean

help: ## lists these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: setup ## trains a small HorNet on handwritten digits, without a download, and shows the result
	$(BIN)/python -m tools.demo

demo-points: setup ## the same for point clouds, on drawn shapes
	$(BIN)/python -m tools.demo_points

demo-detection: ## the same for detection, on drawn shapes
demo-segmentation: ## the same for segmentation
demo-detection demo-segmentation: demo-%: dense
	$(BIN)/python -m tools.demo_dense $*

# by default the checkpoint of the newest finished demo, which has a report
CHECKPOINT ?= $(patsubst %report.html,%checkpoint-best.pth,$(shell ls -t runs/demo-*/report.html 2>/dev/null | head -1))
web: .venv/.web $(if $(CHECKPOINT),,demo) ## a web page to try a model: make web CHECKPOINT=FILE [CONFIG=FILE]
	$(BIN)/python -m tools.web --checkpoint "$(CHECKPOINT)" $(if $(CONFIG),--config "$(CONFIG)")

.venv/.web: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[web]'
	touch $@

test: setup ## the tests of the default suite
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: setup ## larger models and longer runs
	$(BIN)/python -m pytest $(PARALLEL) --dist loadfile --durations 40 --ignore tests/clients -m slow

dense: setup ## adds mmdet and mmsegmentation; compiles mmcv, about 5 minutes
	tools/install_dense.sh

test-dense: dense .venv/.web ## tests of detection and segmentation
	$(BIN)/python -m pytest $(PARALLEL) -m dense tests/dense

test-web: .venv/.web ## tests of the web page in Chromium, if it is installed
	$(BIN)/python -m pytest -m "slow or not slow" tests/integration/test_web.py

test-clients: build/clients/.installed ## exported files in other programs (installs 1.8 GB)
	build/clients/venv/bin/python -m pytest $(PARALLEL) -m slow tests/clients

build/clients/.installed: pyproject.toml tests/clients/install.sh examples/web/package.json | setup
	tests/clients/install.sh
	touch $@

test-faults: setup ## kills runs at random moments and compares their results (half an hour)
	$(BIN)/python -m tests.faults --kills 50
	$(BIN)/python -m pytest -v -m "slow or not slow" $(addprefix tests/integration/test_,survive.py slurm.py evaluation.py hostile.py)

# import-linter reads packages only, so each top-level module is linked as a package
lint: setup ## ruff, mypy, codespell and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/codespell
	rm -rf build/imports
	for module in *.py; do mkdir -p build/imports/$${module%.py}; ln -s $(CURDIR)/$$module build/imports/$${module%.py}/__init__.py; done
	for package in */__init__.py; do ln -s $(CURDIR)/$${package%/*} build/imports; done
	cd build/imports && $(CURDIR)/$(BIN)/lint-imports --no-logo $(CURDIR)/pyproject.toml

format: setup ## formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/.installed ## creates .venv with all extras but web, heif and those for phones (7 GB)

# the mark is written last, so that an interrupted installation starts again
.venv/.installed: pyproject.toml
	@echo "installing into .venv (7 GB): takes a few minutes and prints nothing"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,data,fast,points,tiff,export,openvino,wandb,dev]'
	touch $@

clean: ## removes .venv and all build outputs
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info build
