# Two commands for a newcomer: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := env -u PYTHONPATH $(BIN)
DEEPSPEED := build/deepspeed

.PHONY: install demo test lint soak bench-quick plots gpu-path gpu-wheels test-gpu bench-gpu tune-gpu clean

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

# Two test processes at a time, one thread each: threads that spin while they wait would hold up the other process.
# Compiled modules are kept, whatever the surroundings say: hundreds of processes are started.
TESTING := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 PYTHONDONTWRITEBYTECODE=

test: install $(DEEPSPEED)/.installed
	$(TESTING) $(RUN)/python -m pytest -m "not soak" -n 2 --dist loadfile --durations=10 tests
	$(TESTING) PYTHONPATH=$(DEEPSPEED) $(BIN)/python -m pytest -n 2 tests/engine/test_zero.py

# Apart from everything else: where it can be imported, transformers imports it in every run.
$(DEEPSPEED)/.installed: constraints.txt | install
	$(BIN)/pip install -q --no-deps --upgrade --target $(DEEPSPEED) $$(grep -E '^(deepspeed|einops|hjson|msgpack|ninja|py-cpuinfo)==' constraints.txt)
	touch $@

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

# On a GPU machine nothing is installed: torch, triton, transformers, accelerate and peft of $(PYTHON) do for the
# measurements. Tests of whole runs also take pytest, scikit-learn, scipy and pyarrow, and pydantic with its needs. Where
# there is no pydantic and no network, `make gpu-wheels` puts it into build/gpu/packages beforehand, to be taken along.
GPU_PATH := build/gpu
GPU_PACKAGES := pydantic pydantic_core annotated-types typing-inspection
GPU_PYTHON := 3.12
ON_GPU := PYTHONPATH=$(GPU_PATH):$(GPU_PATH)/packages TRITON_INTERPRET=0 $(PYTHON)

gpu-wheels: install
	rm -rf $(GPU_PATH)/packages
	$(BIN)/pip install -q --no-deps --no-compile --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --target $(GPU_PATH)/packages \
	  $(foreach name,$(GPU_PACKAGES),$$(grep '^$(name)==' constraints.txt))

gpu-path:
	mkdir -p $(GPU_PATH)/regraft
	for part in engine kernels serve; do ln -sfn ../../../$$part $(GPU_PATH)/regraft/$$part; done

# The kernels' tests compiled instead of interpreted, then a few of them watched for bad memory accesses: without the caching
# allocator, in whose large blocks every tensor has neighbours that may be read unpunished.
test-gpu: gpu-path
	$(ON_GPU) -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
	$(ON_GPU) -c "import pydantic" || { echo "run 'make gpu-wheels' where there is a network; take $(GPU_PATH)/packages along"; exit 1; }
	$(ON_GPU) -m pytest tests/kernels tests/engine/test_gpu_step.py tests/engine/test_captured_optimizer.py tests/engine/test_ways.py tests/engine/test_gpu_sharding.py tests/engine/test_speed_gpu.py
	if command -v compute-sanitizer >/dev/null; then $(ON_GPU:$(PYTHON)=) PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \
	  $(PYTHON) -m pytest tests/kernels -k "(same_bits or within_the_window or long_sequence or empty) and triton"; else echo "compute-sanitizer is not installed"; fi

# Which attention runs for which shape on this GPU: measured once, kept in kernels/hand_over.json.
tune-gpu: gpu-path
	$(ON_GPU) bench/kernels_gpu.py --hand-over

# At most 8 minutes on one H200; the short table comes last.
bench-gpu: gpu-path
	failed=0; for name in kernels_gpu train_gpu; do $(ON_GPU) bench/$$name.py || failed=1; done; \
	  $(ON_GPU) -c "import matplotlib" 2>/dev/null && $(ON_GPU) bench/plot.py $$(ls bench/results/*_gpu.json) \
	  || echo "no matplotlib here: 'make plots' draws the results"; \
	  $(ON_GPU) bench/gpu_table.py || failed=1; exit $$failed

plots: install
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(RUN)/python bench/plot.py

clean:
	rm -rf $(VENV) build runs bundles *.egg-info
