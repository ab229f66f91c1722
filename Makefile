# Every target sets up what is missing. `make help` lists them.
BIN := .venv/bin
READY := .venv/.installed
# options for `make serve`, e.g. make serve ARGS="--port 9000 path/to/model"
ARGS ?=

.PHONY: help setup setup-tpu-xla serve test test-all test-tpu-xla test-tpu-aot tpu-table coverage check fix bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## create .venv with every package, editable, and the developers' tools

# what an installation depends on: metadata, tools, and the sources that are compiled
INPUTS := scripts/setup constraints.txt requirements-dev.txt core/pyproject.toml $(wildcard plugins/*/pyproject.toml) \
	$(wildcard core/setup.py core/_build/*.py core/src/dovetail/platforms/cpu/native/*.[ch]*)

$(READY): $(INPUTS)
	scripts/setup

# torch_xla fits another torch than the rest is developed with
XLA := .venv-tpu-xla
XLA_READY := $(XLA)/.installed
# what is of that bridge, and what is of whichever there is
XLA_TESTS := $(addprefix plugins/tpu/tests/,xla test_conformance.py test_ops_conformance.py test_sampling.py \
	test_sampled_tokens.py) tests/parity/test_tpu.py
# the chips' compiler
LIBTPU := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt libtpu

setup-tpu-xla: $(XLA_READY) ## create .venv-tpu-xla with torch_xla, for its bridge to TPUs

$(XLA_READY): scripts/setup-tpu-xla tools/make_cuda_stubs.py plugins/tpu/pyproject.toml | $(READY)
	scripts/setup-tpu-xla

serve: $(READY) ## serve the embedded demo model on 127.0.0.1:8000 (ARGS="…" adds options)
	$(BIN)/dovetail serve $(ARGS)

test: $(READY) ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

# there is libtpu for Linux on x86-64 alone; elsewhere, what it compiles is skipped, and the tests' report says so
test-all: $(READY) ## all tests; installs libtpu (684 MB)
	-$(LIBTPU)
	$(BIN)/python -m pytest -q $(ARGS)

test-tpu-xla: $(XLA_READY) ## the TPU platform over torch_xla, with programs executed on the CPU
	PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest -q -W "ignore:CUDA initialization" $(XLA_TESTS) $(ARGS)

test-tpu-aot: $(READY) ## compile for every TPU generation, without one; installs libtpu, its compiler (684 MB)
	$(LIBTPU)
	$(BIN)/python -m pytest -q -m aot --numprocesses auto --maxprocesses 4 --dist worksteal plugins/tpu/tests $(ARGS)

tpu-table: $(READY) ## write docs/reference/tpu-aot.md from what that compiler says
	$(LIBTPU)
	$(BIN)/python -m dovetail_tpu.table docs/reference/tpu-aot.md

coverage: $(READY) ## the tests, with a report of lines not covered
	$(BIN)/python -m pytest -q -m "not slow" --cov --cov-report=term $(ARGS)

check: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(READY) ## repair what ruff can repair
	$(BIN)/ruff check --fix .

BENCH_MODEL := build/bench-model
# interpreters of peers to compare with, e.g. make bench PEERS="--vllm /opt/vllm/bin/python" (see benchmarks/cpu/README.md)
PEERS ?=

bench: $(READY) $(BENCH_MODEL) ## speed against transformers and other peers, scheduler cost, start-up (PEERS="…" adds peers)
	$(BIN)/python benchmarks/cpu/compare.py $(BENCH_MODEL) --transformers $(BIN)/python $(PEERS) $(ARGS)
	$(BIN)/python benchmarks/scheduler_step.py
	$(BIN)/dovetail bench startup

$(BENCH_MODEL): | $(READY)
	$(BIN)/python benchmarks/cpu/make_model.py $@

clean: ## remove environments and caches
	rm -rf .venv .venv-tpu-xla .mypy_cache .ruff_cache .pytest_cache .hypothesis
