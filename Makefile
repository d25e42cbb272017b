# Needs python3 (3.10 or newer, with venv and pip), make and g++; everything else goes into .venv.
#
#   make demo     train, kill in the middle of a save, resume, compare bit for bit
#   make test     lint, native build with warnings as errors, test suite
#   make bench    benchmarks beside the peers, raw disk beside them: an hour; rewrites docs/benchmarks.md
#                 (scratch is beside the checkout, or BENCH_ARGS=--bench-dir=DIRECTORY on the disk to measure)
#                 (.venv/bin/python -m benchmarks.scale: plans and votes of 8 to 16,384 ranks)
#   make lint     ruff, mypy, clang-format        make format   let ruff and clang-format rewrite
#   make clean    remove all that was built, .venv too
#
# Another torch: make test TORCH='torch==2.11.0' CONSTRAINTS=

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= -c constraints.txt
MEGATRON ?= megatron-core==0.16.1
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
PEERS ?= torchsnapshot torch_checkpointing dlrover

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
NATIVE := $(wildcard csrc/*.cpp csrc/*.h)

.DELETE_ON_ERROR:
.PHONY: demo test bench lint format clean

demo: $(VENV)/.installed
	$(PY) examples/demo.py --out build/demo $(DEMO_ARGS)

test: lint $(VENV)/.warnings-checked
	$(PY) -m pytest -q $(PYTEST_ARGS)

bench: $(VENV)/.peers
	$(PY) -m pytest -q benchmarks --benchmark-only $(BENCH_ARGS)

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f asyncckpt/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A chain, not a fan: two pips never run in one .venv, also under `make -j`.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch alone and first: pip then takes a CPU wheel that PIP_FIND_LINKS or PIP_INDEX_URL offers.
$(VENV)/.torch: $(VENV)/.created
	$(PIP) install $(CONSTRAINTS) '$(TORCH)'
	@touch $@

# Editable, and again whenever what it was built from changed; what is satisfied is not downloaded again.
# Megatron is for the tests: without its dependencies, which would choose among torch's wheels anew.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PIP) install -q $(CONSTRAINTS) 'setuptools>=64' 'nanobind>=2.0'
	$(PIP) install -q $(CONSTRAINTS) --no-build-isolation -e '.[test,bench,examples]'
	$(PIP) install -q $(CONSTRAINTS) --no-deps '$(MEGATRON)' packaging einops psutil
	@touch $@

# What benchmarks compare with, each with what it needs here and without its other dependencies, which would
# choose among torch's wheels anew. One that cannot be had is shown as not installed, and tried again next time.
torchsnapshot := torchsnapshot==0.1.0 aiofiles==25.1.0 importlib_metadata==8.9.0 nest_asyncio==1.6.0 \
	PyYAML==6.0.4 zipp==4.1.2
torch_checkpointing := torch_checkpointing==0.1.1 safetensors==0.8.0
dlrover := dlrover==0.6.1 certifi==2026.10.19.post1 charset_normalizer==3.5.3 grpcio==1.85.3 idna==3.20 \
	requests==2.34.2 urllib3==2.8.0

$(VENV)/.peers: $(VENV)/.installed
	@all=yes; $(foreach peer,$(PEERS),$(PIP) install -q --no-deps $($(peer)) || all=no;) \
	test $$all = no || touch $@

# Compiles csrc/ once more with -Wall -Wextra -Werror; the module it links is not the installed one.
$(VENV)/.warnings-checked: $(VENV)/.installed
	ASYNCCKPT_WERROR=1 $(PY) setup.py -q build_ext --build-lib build/checked --build-temp build/checked
	@touch $@
