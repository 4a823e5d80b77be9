# Two commands on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Networks and matrices are small here: threads of one operation would mostly wait for one another.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test slow bench docs lint format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## pretrain SwAV on the built-in digits, evaluate it, write the report page
	@$(BIN) scripts/demo.py $(ARGS)

test: $(INSTALLED) ## the default tests (one process a core, four at most)
	@$(BIN) -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

slow: $(INSTALLED) ## the tests that take minutes (two files at a time)
	@$(BIN) -m pytest -m slow -n auto --maxprocesses 2 --dist loadfile $(ARGS)

# Results to be committed: make bench ARGS="--folder bench/results --hardware NAME".
bench: $(INSTALLED) ## measure what needs no GPU, under 10 minutes, into runs/bench; CLUSTERSSL_DATA names the photographs
	@$(BIN) -m uv pip install --quiet --python $(BIN) --constraint constraints.txt --requirement pyproject.toml --extra bench
	@$(BIN) bench/suite.py $(ARGS)

docs: $(INSTALLED) ## the documentation as a site, site/index.html; a broken link is an error
	@$(BIN) -m uv pip install --quiet --python $(BIN) --constraint constraints.txt --requirement pyproject.toml --extra docs
	@NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build --quiet --strict

lint: $(INSTALLED) ## ruff and mypy
	@$(BIN) -m ruff check .
	@$(BIN) -m ruff format --check .
	@$(BIN) -m mypy

format: $(INSTALLED) ## let ruff mend what it can
	@$(BIN) -m ruff check --fix .
	@$(BIN) -m ruff format .

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

# The environment is made again when the dependencies or their pins change; the package itself runs from the checkout.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || \
		{ echo "error: $(PYTHON) not found; install Python 3.10 or newer, or name one: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version 2>&1) is too old, 3.10 or newer is needed; name one: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "Making the environment in $(VENV); the first time this downloads PyTorch, some minutes on a fast line."
	@$(BIN) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@$(BIN) -m uv pip install --python $(BIN) --constraint constraints.txt --requirement pyproject.toml --extra dev
	@touch $(INSTALLED)
