# Every target runs in the environment that .ci/venv finds or makes; PY=/path/to/python names one instead.
# ARGS= goes to pytest, `make test ARGS="-k affine -x"`, or to the report, `make kernels ARGS=--check`.

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs compile older-tritons get-older-tritons versions kernels host bench sweep plot tune gpu dist clean
.NOTPARALLEL:

ifdef PY
export STN_PYTHON := $(PY)
endif

# Prints pytest's options for running in parallel: a worker for each core and 3 GiB of memory, 8 at most.
define WORKERS
import importlib.util, os
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
workers = min(cores, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (3 << 30), 8)
if workers > 1 and importlib.util.find_spec("xdist"):
    print("-n", workers, "--dist", "loadgroup")
endef
export WORKERS

# The supported versions of Triton before the newest, each beside the PyTorch at hand. Versions share the 12 parts
# of the subset of specialisations, as compiling takes long: the newest compiles what these leave.
OLDER := 3.6 3.7 3.8
REQUIREMENTS_3.6 := 'triton==3.6.*' 'numpy<2.4'
REQUIREMENTS_3.7 := 'triton==3.7.*'
REQUIREMENTS_3.8 := 'triton==3.8.*'
PARTS_3.6 := 1 2 3 4
PARTS_3.7 := 5 6
PARTS_3.8 := 7 8
PART = tests/test_compile.py::test_specialisations_compile
# The oldest one's compiled code is executed too, as the newest's is.
EXECUTED_3.6 = 'tests/test_compiled.py::test_compiled_code_is_right_and_stays_in_its_tensors[every_triton]'
# What takes long comes first, that workers end together.
OLDER_TESTS = $(EXECUTED_$*) $(PARTS_$*:%='$(PART)[%]') tests/test_triton_versions.py
# The parts as version:part; what a Triton that could not be had has not compiled, the newest compiles too.
SHARED := $(foreach v,$(OLDER),$(PARTS_$v:%=$v:%))

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## run the demonstration
	@py=$$(.ci/venv demo) && "$$py" -m examples.demo

test: ## run all tests, those under older versions of Triton included
	@py=$$(.ci/venv test) || exit 1; status=0; \
	$(MAKE) --no-print-directory -k older-tritons OPTIONAL=1 PY="$$py" || status=1; \
	for shared in $(SHARED); do \
		[ ! -d build/triton-$${shared%:*} ] || set -- "$$@" --deselect "$(PART)[$${shared#*:}]"; \
	done; \
	"$$py" -m pytest $$("$$py" -c "$$WORKERS") "$$@" $(ARGS) || status=1; \
	exit $$status

lint: ## check style and types
	@py=$$(.ci/venv lint) || exit 1; status=0; \
	"$$py" -m ruff check . || status=1; \
	"$$py" -m ruff format --check . || status=1; \
	"$$py" -m mypy stn_triton || status=1; \
	exit $$status

docs: ## build the documentation without a network: build/docs/index.html; a warning or a dead link fails
	@py=$$(.ci/venv docs) && "$$py" -m sphinx -q -E -W --keep-going -b html docs build/docs $(ARGS)

compile: ## compile every kernel specialisation for GPUs that need not be there
	@py=$$(.ci/venv test) && "$$py" -m bench.specialisations --all

older-tritons: $(OLDER:%=triton-%) ## run what versions of Triton could differ in under each older one
get-older-tritons: $(OLDER:%=get-%)

# With OPTIONAL=1 a Triton that cannot be had is reported, but is no failure. The directory comes into being
# complete or not at all.
get-%:
	@py=$$(.ci/venv test) || exit 1; dir=build/triton-$*; \
	if [ -d $$dir ]; then exit; fi; \
	case $$("$$py" -c 'import triton; print(triton.__version__)') in $*.*) \
		echo "Triton $*: skipped, the environment's is that already"; exit 0;; esac; \
	rm -rf $$dir.part; \
	"$$py" -m pip --disable-pip-version-check -qq --retries 1 install \
		--no-deps --target $$dir.part $(REQUIREMENTS_$*) && mv $$dir.part $$dir || { \
		echo "Triton $*: skipped, pip cannot get" $(REQUIREMENTS_$*); [ -n "$(OPTIONAL)" ]; }

triton-%: get-%
	@py=$$(.ci/venv test) || exit 1; dir=build/triton-$*; \
	if [ ! -d $$dir ]; then exit; fi; \
	echo "Triton $*: running" $(OLDER_TESTS); \
	PYTHONPATH="$(CURDIR)/$$dir:$(CURDIR)" "$$py" -m pytest $$("$$py" -c "$$WORKERS") $(OLDER_TESTS)

# By hand: three of the five bring gigabytes. Without an index of CPU builds name one, PIP_EXTRA_INDEX_URL=...
versions: ## run the telling tests on each pair of PyTorch and Triton, in environments of their own under build/
	@.ci/versions $(ARGS)

kernels: ## report what the compiler made of the kernels; ARGS=--update-budget makes it the budget
	@py=$$(.ci/venv test) && "$$py" -W ignore -m bench.report $(ARGS)

bench: ## time the kernels with pytest-benchmark; ARGS=--benchmark-compare compares with the last time
	@py=$$(.ci/venv bench) && "$$py" -m pytest bench/test_speed.py --benchmark-autosave $(ARGS)

RESULTS := build/bench
sweep: ## time the kernels and every rival on a GPU: build/bench/results.json; ARGS="--select rgb --quick"
	@py=$$(.ci/venv bench) && "$$py" -m bench.sweep --out $(RESULTS) $(ARGS)

plot: ## draw the results of sweep
	@py=$$(.ci/venv bench) && "$$py" -m bench.plot $(RESULTS)/results.json $(ARGS)

tune: ## tune the kernels for the GPU at hand, into kernels/tuned/; ARGS="--budget-seconds 300"
	@py=$$(.ci/venv bench) && "$$py" -m bench.tune $(ARGS)

gpu: ## on a GPU, in nine minutes: tests, memcheck, sweep, pictures, into build/gpu
	@py=$$(.ci/venv bench) && "$$py" -m bench.gpu $(ARGS)

host: ## measure the host time of a call, by layers
	@py=$$(.ci/venv test) && env -u TRITON_INTERPRET "$$py" -m bench.host $(ARGS)

dist: ## build the source distribution and the wheel into dist/
	@py=$$(.ci/venv dev) && rm -rf build/lib && "$$py" -m build --outdir dist .

clean: ## remove builds and caches, but not .venv
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
