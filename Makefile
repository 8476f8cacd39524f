# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY  := $(VENV)/.ready

.PHONY: quickstart quickstart-video test test-fast lint readme clean

quickstart: $(READY)
	$(BIN)/python -m seppo_fast.quickstart --out runs/quickstart

# The same for video: a tiny AnimateDiff and clips of moving digits.
quickstart-video: $(READY)
	$(BIN)/python -m seppo_fast.quickstart.video --out runs/quickstart_video

test: $(READY) lint
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=10

# For the edit loop, in two minutes: all but what trains, compiles or starts processes (tests/conftest.py knows by the fixtures) and
# what carries @pytest.mark.slow. A test that takes long and is not marked is named at the end.
test-fast: $(READY)
	$(BIN)/python -m pytest -n logical --dist worksteal -m "not slow"

# Where Python is told to write no bytecode, each worker of each run would rewrite the assertions of all tests anew.
test test-fast: export PYTHONDONTWRITEBYTECODE :=

# ruff, the direction of imports that pyproject.toml states, and types.
lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# The README's tables, generated from benchmarks/results/.
readme: $(READY)
	$(BIN)/python -m benchmarks.readme

# torch first and pinned: a ranged requirement may bring another build. No build isolation: it would fetch torch once more.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
