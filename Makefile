# Everything sets itself up in .venv; needs python3 >= 3.11, pip and a package index.
PYTHON ?= python3
BIN := .venv/bin
BUNDLE := artifacts/nld-tiny-cpu
GPU_BUNDLE := artifacts/nld-tiny-gpus

.PHONY: demo test lint docs setup clean
.DELETE_ON_ERROR:

setup: .venv/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("trimode needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

# The main job, as a user would type it: compile, look inside, generate in three modes, diffusion with and without its learned sampler.
demo: setup
	$(BIN)/trimode build artifacts/nld-tiny -o $(BUNDLE) --target cpu --sampler artifacts/nld-tiny-sampler --force
	$(BIN)/trimode inspect $(BUNDLE)
	$(BIN)/trimode build artifacts/nld-tiny -o $(GPU_BUNDLE) --target rtx-pro-6000 --target dgx-spark --target rtx-4090 --target cpu --force
	$(BIN)/trimode inspect $(GPU_BUNDLE)
	$(BIN)/trimode verify $(GPU_BUNDLE) --against artifacts/nld-tiny --target cpu
	@for mode in ar diffusion "diffusion --sampler learned" linear-spec; do for prompt in \
	  "JSON: Clara is 47 and lives in Kyoto." "SQL: name of books with price over 40, by price." "Add 478 and 356."; do \
	  echo; echo "trimode run $(BUNDLE) --mode $$mode --prompt \"$$prompt\""; \
	  $(BIN)/trimode run $(BUNDLE) --mode $$mode --prompt "$$prompt" || exit 1; done; done

# Two workers, each with one thread for PyTorch and ONNX Runtime to share. Each begins at an end of the list of tests and takes them in order, so
# that a module's fixtures are mostly made once; graphs are traced, and the common bundles built, once for both.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/sizes.py

# The pages of docs/ as a site, in site/. A link that leads nowhere is an error.
docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv $(BUNDLE) $(GPU_BUNDLE) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
