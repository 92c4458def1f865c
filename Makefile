# Every target makes `.venv` first if it is missing or older than what it is made from.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORLD := .venv-world

AOT := .venv-aot
DOCS := .venv-docs
LOWEST := .venv-lowest
NEWEST := .venv-newest

# A part of the tests that takes minutes, for other versions of what is installed.
QUICK := $(addprefix parity_tests/,test_imports.py cli/test_help.py cli/test_inspect.py models/test_layer.py \
	models/test_scan.py op/test_choice.py op/test_op.py op/test_sharding.py packages weights/test_formats.py \
	weights/test_training.py)

.PHONY: verify test test-long test-all test-world test-lowest test-newest test-packages fuzz lint format bench accelerators accelerators-quick docs clean help

verify: $(STAMP)  ## both twins of VOLO-D1 on real photos, with a verdict
	$(BIN)/outlook verify

test: $(STAMP)  ## every test but the long and the slow ones
	$(BIN)/pytest -n 2 --dist worksteal -m "not long and not slow"

test-long: $(STAMP)  ## the long tests: pages of the docs, other compilers, several devices and processes
	$(BIN)/pytest -n 2 --dist worksteal -m "long and not slow"

test-all: $(STAMP)  ## every test
	$(BIN)/pytest -n 2 --dist worksteal

test-world: $(WORLD)/.installed  ## models of other packages: honest pairs and faults, in a .venv-world of their own
	$(WORLD)/bin/pytest parity_tests/world

test-lowest: $(LOWEST)/.installed  ## a quick part at the oldest versions that pyproject.toml allows, in .venv-lowest
	$(LOWEST)/bin/pytest -n 2 --dist worksteal -m "not slow" $(QUICK)

test-newest: $(NEWEST)/.installed  ## the same at the newest for PYTHON, in .venv-newest
	$(NEWEST)/bin/pytest -n 2 --dist worksteal -m "not slow" $(QUICK)

test-packages: $(STAMP)  ## the wheel, installed bare and with each extra in venvs of their own, and used there
	$(BIN)/python -m parity_tests.packages

fuzz: $(STAMP)  ## hostile files of weights, conversions killed at random moments
	$(BIN)/python -m parity_tests.weights.fuzz
	$(BIN)/python -m parity_tests.weights.kill

lint: $(STAMP)  ## ruff (lint, format) and mypy --strict
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## ruff: fix and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)  ## timings against peers, what the verifier takes, into benchmarks/results/
	$(BIN)/python -m benchmarks

# A venv of its own: a libtpu or a CUDA plugin beside the tests would change what they find.
accelerators: $(AOT)/.installed  ## compile for TPU and GPU without either, into benchmarks/results/accelerators.md
	$(AOT)/bin/pytest --noconftest parity_tests/accelerators
	$(AOT)/bin/python -m benchmarks.accelerators

accelerators-quick: $(AOT)/.installed  ## three of its tests: one chip, sixteen chips, an H100
	$(AOT)/bin/pytest --noconftest parity_tests/accelerators \
		-k "none_gets and v5e and forward or sixteen and None and heads and forward or h100 and forward"

docs: $(DOCS)/.installed  ## the documentation site, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

clean:  ## remove the virtual environments and the site
	rm -rf .venv $(WORLD) $(AOT) $(DOCS) $(LOWEST) $(NEWEST) site

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# timm is the oracle of the tests. It imports torchvision, of which there is no CPU build beside PyTorch's: both are
# installed without their dependencies, and the tests declare the two operators that torchvision then lacks.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm torchvision
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints.txt constraints-lowest.txt Makefile
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt torch==2.13.0
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[test]'
	$(LOWEST)/bin/pip install --quiet --constraint constraints.txt --no-deps timm torchvision
	touch $@

$(NEWEST)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet torch==2.13.0
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]' torch==2.13.0
	$(NEWEST)/bin/pip install --quiet --constraint constraints.txt --no-deps timm torchvision
	touch $@

# Other packages' models, in a place of their own: transformers 4.57 is the last with models in Flax.
$(WORLD)/.installed: pyproject.toml constraints.txt constraints-world.txt Makefile
	$(PYTHON) -m venv --clear $(WORLD)
	$(WORLD)/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(WORLD)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(WORLD)/bin/pip install --quiet --no-deps --requirement constraints-world.txt
	touch $@

$(AOT)/.installed: pyproject.toml constraints.txt constraints-aot.txt Makefile
	$(PYTHON) -m venv --clear $(AOT)
	$(AOT)/bin/pip install --quiet --constraint constraints.txt --constraint constraints-aot.txt --editable '.[aot]'
	touch $@

# No framework: the reference is read from the source.
$(DOCS)/.installed: pyproject.toml constraints.txt constraints-docs.txt Makefile
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/pip install --quiet --constraint constraints.txt --constraint constraints-docs.txt --editable '.[docs]'
	touch $@
