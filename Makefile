# The two commands of the README are `make demo` and `make test`; both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# A worker takes some 1.5 GB: one for each of many cores would run out of memory.
WORKERS ?= auto --maxprocesses 8
EXTRAS := .venv-extras

.PHONY: demo test test-gpu test-extras matrix check docs bench report clean

demo: $(INSTALLED)
	$(BIN)/dynmask demo --out demo-out

# One thread a worker: threads that wait for each other on shared cores waste most of their time.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q

# The tests of the GPU kernels, by a python that has torch with CUDA and pytest: nothing is set up.
test-gpu:
	$(PYTHON) -m pytest -q tests/masks/test_*triton*.py tests/ops/test_*triton*.py \
	  tests/dam/test_*kernel*.py $(PYTEST)

# The examples with what development does not install: peft, lm-eval and transformers' server. In a
# venv of its own. Without the import these tests would skip themselves.
test-extras: $(EXTRAS)/installed
	$(EXTRAS)/bin/python -c 'import fastapi, lm_eval, openai, peft, uvicorn'
	OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest -n $(WORKERS) -q tests/examples $(PYTEST)

# The oldest, pinned and newest versions, each in an environment of its own under .nox: noxfile.py.
# NOX='-s oldest_transformers', which .ci/run takes, runs one; NOX=-l lists them.
matrix: $(INSTALLED)
	$(BIN)/nox $(NOX)

check: $(INSTALLED) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in site/; a warning is an error (not with --quiet, which would drop it).
# `python -m http.server -d site` shows it.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/stripes_cpu.py --out benchmarks/results/stripes_cpu.json

report: $(INSTALLED)
	$(BIN)/dynmask report --plan demo-out/plan --results demo-out/results.json --out demo-out/report.html

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dynmask needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[hf,eval,report,train,docs,dev]'
	touch $(INSTALLED)

$(EXTRAS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[hf,train,dev]' lm-eval peft 'transformers[serving]'
	touch $@

clean:
	rm -rf .venv $(EXTRAS) .nox demo-out build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
