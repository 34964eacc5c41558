# Set-up and everyday commands. The environment in .venv is what poetry.lock pins,
# with its hashes, installed by pip: pip reads every kind of package index, and
# Poetry's own installer does not. Poetry itself lives apart, in .poetry, so that
# its dependencies never mix with those of the project.

PYTHON ?= python3
ARGS ?=
POETRY := .poetry/bin/poetry
READY := .venv/.ready
TEST_ENV := FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 \
	OMP_NUM_THREADS=1 MPLBACKEND=agg
# Two processes that run tests suit a machine of two cores: most tests compute.
WORKERS ?= 2
PYTEST := $(POETRY) run pytest -n $(WORKERS)
SOURCES := masksl hydra_plugins scripts tests examples
FLOWER_FILES := client_app dataset model server_app strategy utils

# An environment that is active where make is called is not the project's.
unexport VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV

.PHONY: help setup run federation test test-all flower-checks lint format clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## Install the locked environment (every other target does so too)

run: $(READY)  ## Train the default job; ARGS="..." overrides its configuration
	$(POETRY) run python -m masksl.main $(ARGS)

federation: $(READY)  ## Train it on a Flower federation of this machine, two nodes over TLS
	$(POETRY) run python -m masksl.federation clients=2 $(ARGS)

test: $(READY)  ## Run the tests that are not marked slow
	$(TEST_ENV) $(PYTEST) $(ARGS)

test-all: $(READY)  ## Run every test
	$(TEST_ENV) $(PYTEST) -m "" $(ARGS)

# What Flower checks on a baseline, in the order in which it does: the files that must
# exist, then everything in the folder by these tools, then the tests.
define FLOWER_LINT
	for name in $(FLOWER_FILES); do test -f masksl/$$name.py || exit 1; done
	$(POETRY) run isort --check-only .
	$(POETRY) run black --check .
	$(POETRY) run docformatter -c -r .
	$(POETRY) run ruff check .
	$(POETRY) run mypy .
	$(POETRY) run pylint --jobs=0 ./masksl
endef

flower-checks: $(READY)  ## Run what Flower checks on a baseline, in its order
	$(FLOWER_LINT)
	$(TEST_ENV) $(POETRY) run pytest .

lint: $(READY)  ## Run the formatters in check mode, the linters and the type checker
	$(POETRY) check --lock
	$(FLOWER_LINT)
	$(POETRY) run pylint --jobs=0 hydra_plugins scripts

format: $(READY)  ## Rewrite the sources in the project's format
	$(POETRY) run isort $(SOURCES)
	$(POETRY) run docformatter --in-place --recursive $(SOURCES) || true
	$(POETRY) run black $(SOURCES)
	$(POETRY) run ruff check --fix $(SOURCES)

clean:  ## Remove the environment and Poetry
	rm -rf .venv .poetry

# pip refuses whatever does not match the hashes that the lock file pins. The mark
# is written last, so that an interrupted installation is taken up again.
$(READY): poetry.lock $(POETRY)
	$(PYTHON) -m venv --clear .venv
	$(POETRY) export --all-extras --format requirements.txt \
		--output .venv/requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --no-deps --requirement .venv/requirements.txt
	$(POETRY) install --only-root
	touch $@

$(POETRY): requirements-poetry.txt
	$(PYTHON) -m venv --clear .poetry
	.poetry/bin/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --requirement requirements-poetry.txt
	touch $@
