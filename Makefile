# Every target sets up what it needs: the virtual environment .venv, by scripts/setup_env.py.
# MOEFOLD_PYTHON chooses the interpreter, ARGS goes to pytest or to the script: make test ARGS="-k fold"
# BENCH chooses the benchmark: make bench BENCH=loading ARGS="--gb 8"
# gpu alone sets up nothing: it takes MOEFOLD_PYTHON as it is, with the torch that fits the machine's GPU.

MOEFOLD_PYTHON ?= python3
PYTHON := .venv/bin/python
ARGS ?=
BENCH ?= run

.DEFAULT_GOAL := help
.PHONY: help demo test test-more test-all lint types docs bench gpu clean setup-demo setup-test setup-docs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup-demo ## set up, then run the main job on CPU ranks: minutes; shorter with ARGS="--steps 40"
	$(PYTHON) examples/demo.py $(ARGS)

test: setup-test ## set up, then run the quick tests: every feature once, under ten minutes on two cores
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile -m "not more and not slow" $(ARGS)

test-more: setup-test ## set up, then run a share of what test leaves out: about half an hour on two cores
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile -m "more and not slow" $(ARGS)

test-all: setup-test ## set up, then run all the tests: hours; goes on where it was stopped, ARGS="--fresh" begins anew
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q --resume -n 2 --dist worksteal $(ARGS)

lint: setup-test ## check the style and the layout of the code (ruff)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: setup-test ## check the types of the package, the benchmarks and the examples (mypy)
	$(PYTHON) -m mypy

docs: setup-docs ## set up, then write the documentation as a site into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict $(ARGS)

bench: setup-test ## run a benchmark: BENCH=run (training steps), moe_layer, expert_parallel, dispatch, overlap, loading, memory, context, bubble, scale, balance
	$(PYTHON) benchmarks/$(BENCH).py $(ARGS)

gpu: ## on one GPU, without set-up and network: tests, correctness, speed, in 9 minutes; ARGS="--rehearse" in small on CPU
	$(MOEFOLD_PYTHON) benchmarks/gpu.py $(ARGS)

clean: ## remove caches, build products and .venv
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup-demo:
	@$(MOEFOLD_PYTHON) scripts/setup_env.py demo

setup-test:
	@$(MOEFOLD_PYTHON) scripts/setup_env.py test

setup-docs:
	@$(MOEFOLD_PYTHON) scripts/setup_env.py docs
