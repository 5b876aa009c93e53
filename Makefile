# Every target works on a fresh machine: the first run sets up .venv, later runs reuse it.
#
#     make demo TORCH=torch==2.11.0 PYTHON=python3.12    another torch, another Python

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
# Memory stays with the process: what a virtual machine has given back to its host, seconds after it was freed, takes ten times as long
# to touch again. (That was two thirds of the time of tests against a reference.)
KEPT := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736
# A process for each core; their threads do not spin where they wait for each other.
PYTEST := OMP_WAIT_POLICY=passive $(KEPT) $(BIN)/python -m pytest -q -n auto
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test suite test-fast test-emulated lint cuda-check sanitize gpu-check bench bench-check scaling clean FORCE

demo: $(VENV)/built
	$(BIN)/python -m deepsim_ext demo

# Two at a time, each with its output in one piece: some of it keeps one core busy only.
test: $(VENV)/built lint
	$(MAKE) --no-print-directory -j2 --output-sync=target cuda-check sanitize suite test-emulated

suite: $(VENV)/built
	$(PYTEST)

test-fast: $(VENV)/built
	$(PYTEST) -m "not slow"

# The CUDA kernels on CPU tensors, by the emulator: small batches by direct differences, then every batch by tiles of either kind.
# What takes minutes there and differs in no kernel from the rest is left out; so is half of what both kinds of tiles share.
EMULATED := not gradcheck or (gradcheck and mean and not nonzero and l2) or (gradcheck and sum and soft)
EMULATED_GRAM := not (gradcheck or double_backward or test_gram.py and opcheck or 37.5 or none or bchw or gatys)
EMULATED_GRAM := $(EMULATED_GRAM) and not (mean and l1) and not (sum and l2)
EMULATED_PAIRS := (values and (all-mean_nonzero or window-mean or semi_hard-soft or contrastive-mean_nonzero) and (cosine-float64 or cosine-float32 or -euclidean-float16))
EMULATED_PAIRS := $(EMULATED_PAIRS) or (long_rows and sqeuclidean) or whole_numbers or duplicates or cancels or margins or (nan_or_inf and bfloat16 and nan)
EMULATED_STRATEGIES := (brute_force or values) and (cosine-float64 or cosine-float32) or minus_one and euclidean
EMULATED_NEIGHBORS := not opcheck and not (sqeuclidean and not float32)
test-emulated: $(VENV)/built
	$(PYTEST) --emulated tests/test_batch_hard.py tests/test_batch_hard_extremes.py -k "$(EMULATED)"
	DEEPSIM_CUDA_MINING=mma $(PYTEST) --emulated tests/test_batch_hard.py tests/test_batch_hard_extremes.py \
		-k "selection or ties or euclidean-float32 or equals"
	DEEPSIM_CUDA_MINING=wgmma $(PYTEST) --emulated tests/test_batch_hard.py -k "not gradcheck"
	$(PYTEST) --emulated tests/test_gram.py tests/test_style.py -k "$(EMULATED_GRAM)"
	$(PYTEST) --emulated tests/test_nearest_neighbors.py -k "$(EMULATED_NEIGHBORS)"
	$(PYTEST) --emulated tests/test_all_pairs.py -k "$(EMULATED_PAIRS)"
	$(PYTEST) --emulated tests/test_mining_strategies.py -k "$(EMULATED_STRATEGIES)"
	$(PYTEST) --emulated tests/test_triplet_margin.py tests/test_contrastive.py tests/test_given_rows.py tests/test_pair_distances.py

# What nvcc makes of the CUDA kernels; where there is no nvcc they are not built either.
cuda-check: $(VENV)/built
ifneq ($(shell command -v nvcc),)
	$(BIN)/python -m tests.cuda_check
else
	@echo "cuda-check: nvcc was not found, the CUDA kernels are not built and not checked"
endif

sanitize: $(VENV)/built
	$(BIN)/python -m tests.sanitize

# On a machine with a GPU, with the torch that is installed there. OUT is the folder for logs and records.
OUT ?= gpu-check
gpu-check:
	$(PYTHON) -m tests.gpu_check $(OUT)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Threads stay on cores of their own: left to the scheduler, two of them at times share one for a whole run.
BOUND := OMP_PROC_BIND=true OMP_PLACES=cores $(KEPT)
bench: $(VENV)/built
	$(BOUND) $(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.readme

# Whether the losses have become slower than the record says, as ratios to one product.
bench-check: $(VENV)/built
	$(BOUND) $(BIN)/python -m benchmarks.check

# The curves in the README.
scaling: $(VENV)/built
	$(BOUND) $(BIN)/python -m benchmarks.scaling

clean:
	rm -rf $(VENV) build deepsim_ext/_C*.so

# What was asked for, touched only when it changes, so that another TORCH or PYTHON sets up anew.
$(VENV).wish: FORCE
	@echo "$(PYTHON) $(TORCH)" | cmp -s - $@ || echo "$(PYTHON) $(TORCH)" > $@

$(VENV)/torch: $(VENV).wish
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy "setuptools>=77" ninja pybind11
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[demo,eval,gallery,bench,test]"
# They ask for torchvision, of which the losses that tests compare with need nothing; it would bring another torch.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps piq==0.8.0 pystiche==1.0.1
# Only for the recordings that it ships, which an example reads.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "aeon>=1.3,<2"
	touch $@
