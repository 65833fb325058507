# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
ARCHIVE := .cache/vaderSentiment-0.5.zip

# The test of the real archive runs where a demo has fetched it.
TESTS = OMP_NUM_THREADS=1 HYBRIDENGINE_VADER_ARCHIVE=$(abspath $(wildcard $(ARCHIVE))) $(VENV)/bin/python -m pytest -q -n 2

.PHONY: demo test slow long lint clean

demo: $(VENV)/.demo $(ARCHIVE)
	$(VENV)/bin/hybridengine demo --archive $(ARCHIVE)

test: $(VENV)/.test
	$(TESTS) -m "not slow and not gpu"

slow: $(VENV)/.test
	$(TESTS) -m "slow and not long and not gpu"

long: $(VENV)/.test
	$(TESTS) -m "long and not gpu"

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The constraints hold the versions this project was tested with; ranges are in pyproject.toml.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[demo,test]"
	touch $@

# Human-rated reviews from the source archive of a package (MIT). Without it the demo uses a small bundled set and says so.
$(ARCHIVE): | $(VENV)/bin/python
	-$(VENV)/bin/python -m pip download -q --no-deps --no-binary :all: -d .cache vaderSentiment==0.5

clean:
	rm -rf $(VENV) build *.egg-info .cache
