# The targets; how things are compiled is in tools/psbuild.py, which setup.py calls as well.
#
#   make test-c TESTS="gguf quant"   only tests/c/test_gguf.c and test_quant.c
#   make test-c ONLY=overflow        only the tests with that in their name
#   make JOBS=1 ...                  one compiler at a time (default: one a CPU)

PYTHON       ?= python3
CLANG_FORMAT ?= clang-format
TESTS        ?=
ONLY         ?=
JOBS         ?=

export PIPESHARD_JOBS   := $(JOBS)
export PIPESHARD_WERROR ?= 1

BUILDER := $(PYTHON) tools/psbuild.py
CTEST   := $(PYTHON) tools/ctest.py $(addprefix --only ,$(ONLY))
C_FILES  = $(shell git ls-files '*.c' '*.h' '*.cu' '*.cuh')

.PHONY: all cuda ext test test-c test-py test-long asan tsan oom fuzz-corpus fuzz layers lint format \
	gpu-test gpu-check clean

all: # build/libps.a, the core without CUDA
	@$(BUILDER) lib

cuda: # build/libps_cuda.a
	@$(BUILDER) lib --cuda

ext: # the extension, in place
	@$(PYTHON) setup.py -q build_ext --inplace

# ---- tests ----

test: test-c ext
	@PIPESHARD_TEST_C=0 $(PYTHON) -m pytest -q

test-c:
	@$(CTEST) $(TESTS)

test-py: ext
	@$(PYTHON) -m pytest -q

test-long: ext # what takes too long for every change; the totals go into tests/long.txt
	@PYTHON=$(PYTHON) tools/test_long.sh

asan: # AddressSanitizer and UndefinedBehaviorSanitizer, after proof that both fire
	@$(CTEST) --sanitize address --planted
	@$(CTEST) --sanitize address $(TESTS)

tsan: # ThreadSanitizer, after proof that it fires
	@$(CTEST) --sanitize thread --planted
	@$(CTEST) --sanitize thread $(TESTS)

oom: # every allocation refused once, leaks counted by AddressSanitizer too
	@$(PYTHON) tools/ctest.py --sanitize address --only oom $(TESTS)

fuzz-corpus: # the corpus and 2,000 fixed mutations of each file
	@$(PYTHON) tools/ctest.py --sanitize address --fuzz 2000 $(TESTS)

fuzz: # libFuzzer for ten minutes a target, from the corpus on
	@CC=clang $(PYTHON) tools/ctest.py --sanitize fuzzer --fuzz 600 --timeout 700 $(TESTS)

# ---- rules ----

layers:
	@$(PYTHON) tools/check_layers.py

lint: all
	@$(PYTHON) tools/check_source.py build/libps.a
	@$(CLANG_FORMAT) --version | grep -q 'version 14\.' || \
		{ echo "lint: clang-format 14 decides layout; this is $$($(CLANG_FORMAT) --version)"; exit 1; }
	@for f in $(C_FILES); do $(CLANG_FORMAT) --dry-run -Werror $$f >/dev/null 2>&1 || \
		{ echo "$$f: not laid out (make format)"; bad=1; }; done; [ -z "$$bad" ]
	@$(PYTHON) -m ruff check -q .
	@$(PYTHON) -m ruff format -q --check . || { echo "lint: make format"; exit 1; }
	@$(PYTHON) -m mypy

format:
	@$(CLANG_FORMAT) -i $(C_FILES)
	@$(PYTHON) -m ruff format -q .

# ---- a machine with a GPU: nothing but C programs, so it needs no Python package ----

gpu-test:
	@PIPESHARD_TEST_DEVICES=host,emu,cuda $(CTEST) --cuda $(TESTS)

gpu-check: # the same and compute-sanitizer
	@tools/gpu_check.sh

clean:
	rm -rf build pipeshard/_core*.so
