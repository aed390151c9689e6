# Two commands for a newcomer: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := env -u PYTHONPATH $(BIN)

.PHONY: install demo test lint soak bench-quick plots clean

install: $(VENV)/.installed

# torch first and pinned: left to itself, pip may take a build with gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(RUN)/python examples/demo.py

test: install
	$(RUN)/python -m pytest -m "not soak" --durations=10 tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/regraft
	for part in engine kernels serve; do ln -sfn ../../../$$part build/types/regraft/$$part; done
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages --explicit-package-bases --cache-dir build/mypy build/types/regraft

soak: install
	$(RUN)/python -m pytest -m soak tests

bench-quick: install
	for name in train_cpu onnx_cpu startup; do $(RUN)/python bench/$$name.py --quick || exit 1; done

plots: install
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(RUN)/python bench/plot.py

clean:
	rm -rf $(VENV) build runs bundles *.egg-info
