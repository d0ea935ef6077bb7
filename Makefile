# make demo   the main job on two small models that it builds: calibrate, plan, run, compare, report in demo/
# make test   lint, types and the whole test suite
# make sanitize  the native kernel's tests, compiled to find reads and writes out of bounds and undefined behaviour
# make clean  removes what these two made
#
# PYTHON= chooses the interpreter (3.11 or newer), VENV= the environment, PYTEST_ARGS= what pytest gets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

# The path is part of the name: a moved checkout needs its editable install written anew.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: demo test lint types venv clean sanitize
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(VENV)/bin/scheinfer validate --demo --quick --out demo

test: lint types
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy --strict hwmodels sim runtime experiments scheinfer.py

# Python and torch hold memory until they end, so leaks are not looked for. What was found is told past sys.stderr, so that
# is left to the terminal. Afterwards the kernel is built as it is used.
SANITIZED := -O1 -g -Wno-psabi -fsanitize=address -fsanitize=undefined -fno-sanitize-recover=all
sanitize: $(STAMP)
	CXXFLAGS='$(SANITIZED)' $(PY) hatch_build.py
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  CXXFLAGS='$(SANITIZED)' $(PY) -m pytest -q --capture=sys $(PYTEST_ARGS) \
	  $(addprefix tests/test_,native.py tiles.py queues.py step.py prompt.py prompt_layer.py projection.py layer.py forward.py \
	    router.py latent.py gpt_oss.py sinks.py window.py); \
	  status=$$?; $(PY) hatch_build.py && exit $$status

venv: $(STAMP)

# torch first and by its exact version: left to the resolver it may fetch several gigabytes twice.
# An environment whose pip does not answer was left half made, and is made anew.
$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard runtime/native/*.cpp runtime/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scheinfer needs Python 3.11 or newer, " \
	  + sys.executable + " is " + sys.version.split()[0] + "; choose another with make PYTHON=...")'
	@$(PIP) --version >/dev/null 2>&1 || \
	  $(PYTHON) -m venv $$(test ! -f '$(VENV)/pyvenv.cfg' || echo --clear) '$(VENV)'
	@rm -f $(VENV)/.installed-*
	$(PIP) install --quiet -c constraints.txt 'torch==2.13.0'
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	test ! -f '$(VENV)/pyvenv.cfg' || rm -rf '$(VENV)'
