# Two commands on a fresh machine: `make demo` runs ESRL end to end, `make test` passes the tests. Both set up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
BENCH ?=

.PHONY: demo setup format lint type check test browser shells docs smoke golden bench

demo: setup  ## ESRL on the bundled model and data, test metrics before and after
	$(BIN)/alignkit train +algo=esrl $(ARGS)

setup: $(VENV)/.ready  ## a virtual environment with the tested set of packages

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

format: setup
	$(BIN)/ruff format alignkit scripts tests
	$(BIN)/ruff check --fix alignkit scripts tests

lint: setup
	$(BIN)/ruff format --check alignkit scripts tests
	$(BIN)/ruff check alignkit scripts tests

type: setup
	$(BIN)/mypy

check: lint type  ## what must be clean at every commit

test: setup  ## all tests
	$(BIN)/pytest -n 2 --ignore=tests/test_report_browser.py --ignore=tests/test_completion_shells.py \
		--ignore=tests/test_verify_every_method.py $(ARGS)

browser: setup  ## the report's page in a real browser; wants chromium (Debian: apt-get install chromium)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	$(BIN)/pytest tests/test_report_browser.py $(ARGS)

shells: setup  ## completion in real shells; wants zsh and fish (Debian: apt-get install zsh fish)
	$(BIN)/pytest tests/test_completion_shells.py $(ARGS)

docs: setup  ## the documentation as a site in site/, which works from a folder
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python scripts/make_docs.py --check site

smoke: setup  ## each stage's tiny configuration through the real command line, and every method killed and gone on with
	$(BIN)/pytest tests/test_smoke.py tests/test_verify_every_method.py $(ARGS)

golden: setup  ## write tests/golden anew: only after a change that is meant to change numbers
	$(BIN)/python scripts/golden.py

bench: setup  ## speed and memory against the alternatives; BENCH=--readme also rewrites the tables in README.md
	$(BIN)/python scripts/bench_decode.py $(ARGS)
	$(BIN)/python scripts/bench_rl.py $(BENCH)
	$(BIN)/python scripts/bench_memory.py $(BENCH)
