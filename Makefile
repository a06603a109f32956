# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes of the test suite; each takes up to 3 GB.
JOBS ?= 2

.PHONY: demo test test-cluster lint proto setup bench bench-gpu methods gallery clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Hueshift needs Python 3.11 or 3.12, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,onnx]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -P examples/demo.py --out out/demo

# Two processes, because half of the suite waits for servers and databases. A file's tests stay together, for its fixtures.
test: setup
	$(BIN)/pytest -m "not cluster" --numprocesses $(JOBS) --dist loadfile

# Ray over several nodes on this machine: minutes of starting and killing processes.
test-cluster: setup
	$(BIN)/pytest -m cluster

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks proto/generate.py deploy docs/tables.py docs/adapter_sizes.py
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

# All fine-tuning methods at equal steps and equal time, for docs/methods.md; skips with a word where ../shared is absent.
# Takes hours on two cores: stop it whenever you like, it goes on where it was. MINUTES=30 stops it by itself.
methods: setup
	$(BIN)/python -P benchmarks/methods_cpu.py $(if $(MINUTES),--max-minutes $(MINUTES))

# Every kind of adapter and way of sampling side by side, for docs/gallery.md, from what is in the repository.
gallery: setup
	$(BIN)/python -P examples/gallery.py

clean:
	rm -rf out build dist *.egg-info
