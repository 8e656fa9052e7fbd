# make run | test | docs-test | systemd-test | faults | chaos | check | format | man | bench | profile | clean; needs make and
# CPython >= 3.11 with venv. ARGS is passed on: make run ARGS="--seconds 5", make test ARGS="-k demo"
# or ARGS="-n0".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 6
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: run test docs-test systemd-test faults chaos check format man bench profile clean

run: $(VENV)/installed
	$(BIN)/forwarder demo $(ARGS)

# Most tests wait: so more of them at a time than there are processors. Each process gets tests that
# are next to each other, for the sake of module fixtures; one that has none left takes over others.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(ARGS)

# The commands and configurations of README.md and docs; part of `make test`, too.
docs-test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) tests/process/test_docs.py tests/process/test_migration.py $(ARGS)

# The shipped unit under a real systemd, which is booted over a view of this system; needs root.
systemd-test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 1 tests/systemd $(ARGS)

# What each fault of the kernel costs, as in docs/faults.md; needs strace, takes half an hour.
# make faults ARGS="'worker splice' ENOMEM" tries those whose name has one of the words.
faults: $(VENV)/installed-dev
	cd tests && $(CURDIR)/$(BIN)/python -m faults $(ARGS)

# Whatever can happen, under a load that checks every byte; needs root. The same SEED does the same;
# without it, by chance. MINUTES may be part of one.
chaos: $(VENV)/installed-dev
	cd tests && $(CURDIR)/$(BIN)/python -m chaos $(if $(SEED),--seed $(SEED)) --minutes $(or $(MINUTES),1) $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

man: $(VENV)/installed-dev
	$(BIN)/python docs/man/generate.py

# Everything, in 65 minutes; make bench QUICK=1 for what matters most, in less than three.
bench: $(VENV)/installed-bench
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench $(if $(QUICK),--short,--all --calls) --out bench-results $(ARGS)

profile: $(VENV)/installed-bench
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench.profile --out bench-results/profile $(ARGS)

clean:
	rm -rf bench-results $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find forwarder tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last, so that what was interrupted is done again.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "forwarder needs CPython 3.11 or newer, and '$(PYTHON)' is not:" \
	    "$$($(PYTHON) --version 2>&1); try: make PYTHON=python3.11" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: pyproject.toml $(VENV)/created
	$(PIP) install --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/created
	$(PIP) install --editable '.[dev]'
	@touch $(VENV)/installed $@

$(VENV)/installed-bench: pyproject.toml $(VENV)/created
	$(PIP) install --editable '.[bench]'
	@touch $(VENV)/installed $@
