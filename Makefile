# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint proto setup bench bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Hueshift needs Python 3.11 or 3.12, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,onnx]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -P examples/demo.py --out out/demo

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks proto/generate.py deploy docs/tables.py
	PYTHONPATH=.typing $(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/buf lint
	$(BIN)/python -P deploy/check.py

proto: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -P proto/generate.py

# Throughput of the service against diffusers' pipeline, on this machine's CPU.
bench: setup
	$(BIN)/python -P benchmarks/serve_cpu.py

# Every GPU benchmark, one row of results each; skips with a word where there is no GPU.
bench-gpu: setup
	$(BIN)/python -P benchmarks/run_gpu.py

clean:
	rm -rf out build dist *.egg-info
