# Every target makes its own .venv first; on a fresh machine `make demo` or `make test` is the only command.
.PHONY: demo test test-rest test-slow lint check docs matrix clean

# On a shared machine, threads that spin at each other's barriers are several times slower than threads that sleep.
export OMP_WAIT_POLICY ?= PASSIVE
# glibc returns freed memory to the kernel early, which zeroes its pages again for the next tensors: up to a tenth of a
# prefill on a CPU. Blocks of 32 MiB, the most that glibc allows here, and less stay with the process.
export MALLOC_TRIM_THRESHOLD_ ?= 2147483647
export MALLOC_MMAP_THRESHOLD_ ?= 33554432

VENV := .venv
BIN := $(VENV)/bin
SUPPORTED := import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
# The first interpreter of a supported version that can make environments; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3; do \
	if $$python -c '$(SUPPORTED)' 2>/dev/null; then echo $$python; break; fi; done)

demo: $(VENV)/.installed
	$(BIN)/python -m scripts.demo

REST := end_to_end or kernels or benchmarks
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

test: $(VENV)/.installed
	$(PYTEST) -m "not slow and not ($(REST))"

test-rest: $(VENV)/.installed
	$(PYTEST) -m "not slow and ($(REST))"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test test-rest

# Every combination of versions in noxfile.py, one after the other: gigabytes of downloads, and minutes for each.
matrix: $(VENV)/.matrix-installed
	$(BIN)/nox

# Strict: a broken link or anchor, or a page outside the navigation, ends the build. The site is in build/site.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The stamp comes last, so that an installation that broke off is done again.
$(VENV)/.installed: pyproject.toml constraints.txt lm_eval_kvpress/_startup.pth
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 with venv found: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.matrix-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check "nox[uv]>=2025.2"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
