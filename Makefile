# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY  := $(VENV)/.ready

.PHONY: quickstart quickstart-flow quickstart-video quickstart-video-flow quickstart-improvement test test-fast lint readme clean

quickstart: $(READY)
	$(BIN)/python -m seppo_fast.quickstart --out runs/quickstart

# The same for a flow: a tiny Stable Diffusion 3.
quickstart-flow: $(READY)
	$(BIN)/python -m seppo_fast.quickstart --model flow --out runs/quickstart_flow

# The same for video: a tiny AnimateDiff and clips of moving digits.
quickstart-video: $(READY)
	$(BIN)/python -m seppo_fast.quickstart.video --out runs/quickstart_video

# The same for a flow of clips: a tiny Wan.
quickstart-video-flow: $(READY)
	$(BIN)/python -m seppo_fast.quickstart.video --model flow --out runs/quickstart_video_flow

# The second method: an improvement model from pairs, then iterative DPO with it.
quickstart-improvement: $(READY)
	$(BIN)/python -m seppo_fast.quickstart.improvement --out runs/quickstart_improvement

test: $(READY) lint
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=10

# For the edit loop, in two minutes: all tests except those that train, compile or start processes (tests/conftest.py knows them by
# their fixtures) and those with @pytest.mark.slow. The end of a run names tests that take long and are not marked.
test-fast: $(READY)
	$(BIN)/python -m pytest -n logical --dist worksteal -m "not slow"

# If Python writes no bytecode, each worker of each run has to rewrite the assertions of all tests again.
test test-fast: export PYTHONDONTWRITEBYTECODE :=

# ruff, the direction of imports (pyproject.toml), and types.
lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# The README's tables, generated from benchmarks/results/.
readme: $(READY)
	$(BIN)/python -m benchmarks.readme

# torch first and pinned: a range of versions may bring another build. No build isolation, which would download torch again.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
