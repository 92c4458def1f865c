# Every target makes `.venv` first if it is missing or older than what it is made from.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: verify test test-all fuzz lint format bench clean

verify: $(STAMP)  ## VOLO-D1 in both frameworks from the same weights on real photos, with a verdict
	$(BIN)/outlook verify

test: $(STAMP)
	$(BIN)/pytest -n 2 -m "not slow"

test-all: $(STAMP)
	$(BIN)/pytest -n 2

fuzz: $(STAMP)  ## thousands of hostile files of weights, then conversions killed at random moments
	$(BIN)/python -m parity_tests.weights.fuzz
	$(BIN)/python -m parity_tests.weights.kill

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv

# timm is the oracle of the tests. It imports torchvision, of which there is no CPU build beside PyTorch's: both are
# installed without their dependencies, and the tests declare the two operators that torchvision then lacks.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm torchvision
	touch $@
