# Everything runs in .venv, made here at first use; later runs reuse it until pyproject.toml or constraints.txt changes.
#
#   PYTHON    the Python (3.11 or newer) that .venv is made from
#   PIP_ARGS  more arguments for pip, an index of CPU builds of torch for example (README, "Install")
#   ARGS      more arguments for the program behind a target:  make test ARGS="--backend=triton"
#   JOBS      test processes (0: one, in pytest itself)
#   THREADS   threads of each test process
#   OUT       the new folder that the demo writes

PYTHON   ?= python3
PIP_ARGS ?=
ARGS     ?=
JOBS     ?= auto
THREADS  ?= 1
OUT      ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

VENV := .venv
RUN  := $(VENV)/bin/python -m
# The constraints hold for the build environment too; pip before 25.3 reads the first name there, later ones the second.
INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(RUN) pip install $(PIP_ARGS) --editable

.NOTPARALLEL:
.PHONY: help demo test test-long test-variants evidence mutants lint format bench docs hooks clean

help:
	@echo "make demo    fine-tune a small video model with SLA and show what came out"
	@echo "make test    run the tests; make test-long: the long ones, too; make test-variants: as on other machines"
	@echo "make evidence  record what the tests see that docs/guarantees.md names"
	@echo "make mutants   change the package in one place at a time, to see whether a test fails"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff put imports and layout in order"
	@echo "make bench   time the torch backend on this CPU"
	@echo "make docs    run the tutorials and build the documentation into site/"
	@echo "make hooks   install the pre-commit hooks"
	@echo "make clean   remove what the targets made, except $(VENV)"

demo: $(VENV)/.has-demo
	$(RUN) sla_ref demo --out $(OUT) $(ARGS)

# One thread for each test process: the processes share the cores already. What the tests of a file share is made once.
test: $(VENV)/.has-dev
	OMP_NUM_THREADS=$(THREADS) $(RUN) pytest --numprocesses=$(JOBS) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder --durations=10 $(ARGS)

test-long: $(VENV)/.has-dev
	$(MAKE) test ARGS="--long $(ARGS)"

# As other machines run them: a CPU without AVX or with AVX2 alone, two threads, no UTF-8 locale and no home folder that
# can be written, and in other orders.
test-variants: $(VENV)/.has-dev
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBILITY $(MAKE) test ARGS="--shuffle=1 $(ARGS)"
	ATEN_CPU_CAPABILITY=avx2 $(MAKE) test THREADS=2 ARGS="--shuffle=2 $(ARGS)"
	LC_ALL=C HOME=/dev/null XDG_CACHE_HOME= $(MAKE) test ARGS="--shuffle=3 $(ARGS)"

# A test that lacks a program fails here: a skipped case would be recorded as one that needs a GPU.
evidence: $(VENV)/.has-dev
	SLA_REF_REQUIRE_TOOLS=1 $(MAKE) test ARGS="--evidence=benchmarks/results/evidence $(ARGS)"
	$(VENV)/bin/python tools/guarantees.py

# Hours, if all of them are to run: each call goes on where the last one stopped.
mutants: $(VENV)/.has-dev
	$(RUN) tools.mutants $(ARGS)

lint: $(VENV)/.has-dev
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

format: $(VENV)/.has-dev
	$(RUN) ruff check --fix
	$(RUN) ruff format

bench: $(VENV)/.has-demo
	$(VENV)/bin/python benchmarks/cpu.py $(ARGS)

# The date is fixed, so that the same sources make the same site.
docs: $(VENV)/.has-docs
	$(VENV)/bin/python tools/build_tutorials.py
	$(VENV)/bin/python tools/explorer_data.py
	NO_MKDOCS_2_WARNING=1 SOURCE_DATE_EPOCH=0 $(RUN) mkdocs build --strict $(ARGS)

hooks: $(VENV)/.has-dev
	$(RUN) pre_commit install

clean:
	rm -rf build dist docs/explorer/data.js docs/tutorials site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing that a venv gets: where it is missing, the venv is not whole.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "sla_ref needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1)" >&2; \
	    echo "Name another one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.has-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.has-demo: EXTRAS = lab
$(VENV)/.has-dev:  EXTRAS = lab,triton,numba,diffusers,lora,docs,dev
$(VENV)/.has-docs: EXTRAS = docs,lab,triton,numba
