# make demo      a virtual environment, the package in it, and the embedded teacher converted
# make test      the same environment with the development tools, and the tests
# make gpu-test  the tests that need a GPU, alone: the kernels there, in bf16 too
# make lint      style, formatting and types
# Needs Python 3.11+, make and a package index. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
DEMO_OUT ?= demo-out

.PHONY: demo test gpu-test lint format clean

demo: $(VENV)/.installed
	$(BIN)/linearize demo --out $(DEMO_OUT)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

gpu-test: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make gpu-test needs a CUDA device and a PyTorch built for it, and $(BIN)/python finds none" >&2; exit 2; }
	$(BIN)/python -m pytest -n 0 -m gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/linearize.egg-info .pytest_cache .mypy_cache .ruff_cache

# Stamps are written last, so an interrupted installation is repeated and a finished one costs nothing.
$(VENV)/.created: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "linearize needs Python 3.11 or newer, and $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "creating $(VENV) and installing (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
