# `make demo` and `make test` work on a fresh clone: each makes .venv, installs the pinned development set, runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-long zoo zoo-check accuracy heads training lint format golden wheel-check clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "polyattn needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train a small transformer with inductor and with polyattn, and compare (about 4 minutes)
	$(BIN)/python examples/demo.py $(DEMO)

test: $(STAMP) ## run the tests, without those marked long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TEST)
	$(if $(TEST),,TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/codegen/triton)

test-long: $(STAMP) ## run the tests marked long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m long $(TEST)

zoo-check: $(STAMP) ## a few models of public packages: found, equal to eager, and as docs/zoo.md says
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[zoo]'
	$(BIN)/python -m pytest tests/zoo $(TEST)

zoo: $(STAMP) ## compile models of public packages, compare with eager, write docs/zoo.md (ZOO="bert t5": only these)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[zoo]'
	$(BIN)/python tests/zoo/run.py $(if $(ZOO),$(ZOO),--write docs/zoo.md)

accuracy: $(STAMP) ## low-rank against exact attention on trained heads, write docs/accuracy.md (8 minutes; ACCURACY="--every 1": all heads, 12 minutes)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[accuracy]'
	$(BIN)/python benchmarks/accuracy.py $(or $(ACCURACY),--every 2) --write docs/accuracy.md

heads: $(STAMP) ## heads of a pretrained encoder with default options beside torch's kernel, into README and docs/clustered.md (10 minutes)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[accuracy]'
	$(BIN)/python benchmarks/encoder_heads.py $(or $(HEADS),--tokens 4096 16384 --texts 5 --every 3 --causal --figure docs/images/near-pairs.png --write docs/clustered.md README.md)

training: $(STAMP) ## train a small model through each family, write docs/training.md
	$(BIN)/python benchmarks/training.py --write docs/training.md

lint: $(STAMP) ## linter, formatter, type checker, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let the linter and the formatter change the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP) ## accept what the golden tests produce now; read the diff before you commit it
	POLYATTN_ACCEPT_GOLDEN=1 $(BIN)/python -m pytest -m golden $(TEST)

wheel-check: $(STAMP) ## build sdist and wheel, import every module of the wheel, resolve the entry point
	$(BIN)/python tests/wheel_check.py

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
