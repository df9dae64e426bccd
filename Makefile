# make test | bench [SUITE=cpu|all] [ARGS=...] | lint | docs | fuzz [SECONDS=60|CASES=...] | slower [SECONDS=60] | recipes | versions | gpu [PYTHON=python3] [STEP=build|smoke|check|bench|sanitize] [RESULTS=folder] | kernels | choose | sanitize | simt-asan | portable | tiles | format | setup | clean
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: test versions bench lint docs format gpu kernels choose fuzz slower recipes sanitize simt-asan portable tiles clean setup

PYTHON ?= python3
SUITE ?= default
SECONDS ?= 60
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPU_INDEX := https://download.pytorch.org/whl/cpu

# Small tests leave a second thread idle, so there is one process per core with one thread each; a test that is about
# threads sets their number itself.
PYTEST_FLAGS ?= -n auto --dist worksteal
SANITIZE_TESTS ?= $(wildcard tests/test_operators.py tests/test_equality.py tests/test_staged*.py tests/test_resident*.py tests/test_winograd.py)
CXX_SOURCES = $(shell find csrc tests/simt \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))

setup: $(STAMP)

# Without an NVIDIA driver the CPU build of torch is installed: from wherever pip finds it, else from PyTorch's own
# index; and Triton for its interpreter, which CUDA builds bring along.
$(STAMP): pyproject.toml setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11+ is needed: make PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) (once; about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@extras=test,bench,lint,docs; \
	nvidia-smi -L >/dev/null 2>&1 || extras=$$extras,triton; \
	if ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    if [[ $$extras == *triton && $$(uname) == Linux ]]; then \
	        $(BIN)/pip install --quiet 'torch==$(TORCH)+cpu' || \
	        $(BIN)/pip install --quiet 'torch==$(TORCH)+cpu' --extra-index-url $(CPU_INDEX); \
	    else \
	        $(BIN)/pip install --quiet 'torch==$(TORCH)'; \
	    fi; \
	fi; \
	$(BIN)/pip install --quiet -e ".[$$extras]"
	@touch $@

test: $(STAMP)
	$(BIN)/python -m fastode build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_FLAGS)

# Before each release: the whole suite on every supported release of torch, each in an environment of its own in .venvs/
# (gigabytes, made once; about ten minutes a release). ARGS names some of them.
versions: $(STAMP)
	$(BIN)/python tests/versions.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --suite $(SUITE) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# Pages and API in docs/_build/html; a warning is an error, and nothing is downloaded.
docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# No venv and no network: the machine's own Python, torch and Triton. On a new machine STEP=build comes first,
# which the others find done. The steps take 180, 90, 180, 240 and 180 seconds at most.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(STEP),--step $(STEP)) $(if $(RESULTS),--results $(RESULTS))

kernels: $(STAMP)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.cuda_kernels

# Where "auto" takes the resident engine on CPUs of this kind: at most 8 minutes, and it wants all cores.
choose: $(STAMP)
	$(BIN)/python -m benchmarks.choose $(ARGS)

# Random blocks against the reference: before a release SECONDS=300, in CI CASES=600. A failure names its seed.
fuzz: $(STAMP)
	$(BIN)/python -m fastode build
	$(BIN)/python -m benchmarks.fuzz $(if $(CASES),--cases $(CASES),--seconds $(SECONDS)) $(ARGS)

# Random blocks under "auto" beside eager, on a quiet machine: what the rule of choice makes slower.
slower: $(STAMP)
	$(BIN)/python -m fastode build
	$(BIN)/python -m benchmarks.slower --seconds $(SECONDS) $(ARGS)

# The two fastest of the papers' experiments, by their command: half a minute on two cores.
recipes: $(STAMP)
	$(BIN)/python -m fastode build
	$(BIN)/python tests/quick_recipes.py

# Everything that compiles or starts processes runs before the sanitizer is preloaded. Two processes of two threads each
# on two cores: waiting threads have to sleep.
SANITIZER := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
RUNTIMES = $(shell g++ -print-file-name=libasan.so):$(shell g++ -print-file-name=libstdc++.so)
sanitize: export CXX := g++
sanitize: export FASTODE_CXXFLAGS := $(SANITIZER)
sanitize: export FASTODE_DEBUG := 1
sanitize: export FASTODE_ONE_DESIGN := 1
sanitize: export OMP_NUM_THREADS := 2
sanitize: export OMP_WAIT_POLICY := passive
sanitize: $(STAMP)
	$(BIN)/python -m fastode build --no-load
	LD_PRELOAD=$(RUNTIMES) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist worksteal $(SANITIZE_TESTS)

# CUDA C++ on the test machine of tests/simt: with poisoned gaps the sanitizer sees the bounds of each array of a block.
SIMT_TESTS ?= $(wildcard tests/test_simt*.py tests/test_cuda_programs.py tests/test_cuda_skew.py tests/test_cuda_solve.py)
simt-asan: export CXX := g++
simt-asan: export FASTODE_SIMT_CXXFLAGS := $(SANITIZER)
simt-asan: export FASTODE_ONE_DESIGN := 1
simt-asan: export OMP_NUM_THREADS := 1
simt-asan: $(STAMP)
	$(BIN)/python -m fastode build
	$(BIN)/python tests/simulator.py
	LD_PRELOAD=$(RUNTIMES) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist worksteal $(SIMT_TESTS)

# The same sources for machines without AVX-512 (vectors of 32 bytes), and without AVX (16 bytes, as NEON's are).
PORTABLE_TESTS ?= tests/test_resident.py tests/test_resident_bf16.py tests/test_resident_skew.py tests/test_resident_linear.py tests/test_adaptive.py tests/test_winograd.py tests/test_operators.py
portable: export FASTODE_ONE_DESIGN := 1
portable: export OMP_NUM_THREADS := 1
portable: $(STAMP)
	for level in x86-64-v3 x86-64-v2; do \
	    export FASTODE_CXXFLAGS="-march=$$level"; \
	    $(BIN)/python -m fastode build && $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 $(PORTABLE_TESTS) || exit 1; \
	done

# The products on AMX tiles, on a machine with AVX-512's dot products of bfloat16 alone.
TILES_TESTS ?= tests/test_resident_bf16.py tests/test_resident_autocast.py
tiles: export FASTODE_CXXFLAGS := -DFASTODE_EMULATED_TILES
tiles: export OMP_NUM_THREADS := 1
tiles: $(STAMP)
	$(BIN)/python -m fastode build
	$(BIN)/python -m pytest -q -p no:cacheprovider -n 2 $(TILES_TESTS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks docs/_build fastode/libfastode-*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venvs/*' -prune -exec rm -rf {} +
