# Everything runs in a virtual environment of its own, .venv, made on first use with PYTHON.
# `make try`, `make demo` and `make test` are all that a newcomer needs; `make test-all` and `make lint` are for contributors.
PYTHON ?= python3
WORKDIR ?= runs/tiny
BIN := .venv/bin
# Tests run in so many processes; compiling for the CPU keeps about one core busy.
JOBS ?= 2
# SHARE=2/3 is the second third of the cases that `make test-all` adds, and half of what takes long; all of them take a
# quarter of an hour.
SHARE ?= 1/1

# Pythons that the newest stack is tried with: the first one that the machine has.
NEWER = python3.14 python3.13 python3.12 \
	$(foreach minor,14 13 12,$(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python))

.PHONY: try demo test test-all test-kills test-beam test-wandb test-harness test-interop test-gpu test-newest test-newest-with lint docs clean

try: .venv/.installed
	$(BIN)/python infer.py --model=small-decoder --prompt="The history of the city begins" --steps=10,1
	$(BIN)/python infer.py --model=small-decoder --length=128 --repeats=10 --eval_batches=2

demo: .venv/.installed
	$(BIN)/python train.py --config=configs/tiny.py --workdir=$(WORKDIR)
	$(BIN)/python infer.py --workdir=$(WORKDIR) --batch=8
	$(BIN)/python infer.py --workdir=$(WORKDIR) --prompt="def main(" --steps=3 --new_tokens=60

test: .venv/.installed-test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist=worksteal

# What `make test` leaves out: all the cases of what it tests in a few, and training two recipes.
test-all: test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist=worksteal -m thorough \
		--group=$(word 1,$(subst /, ,$(SHARE))) --splits=$(word 2,$(subst /, ,$(SHARE)))
	XLA_FLAGS= $(BIN)/python -m pytest -q -n $(JOBS) --dist=load -m slow --splits=$(if $(filter 1/1,$(SHARE)),1,2) \
		--group=$(if $(filter 1/1,$(SHARE)),1,$$(( $(word 1,$(subst /, ,$(SHARE))) % 2 + 1 )))

# Runs that are killed again and again, one process and two, against those that are left alone; damaged checkpoints, and
# every shape of mesh.
test-kills: .venv/.installed-test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist=loadfile -m kills tests/kills

# Against torch and transformers, which are large: without them `make test` skips these. Their deprecations are theirs;
# gradients are compared as XLA optimises them (see tests/conftest.py).
test-interop: .venv/.installed-interop-test
	XLA_FLAGS= ODELM_INTEROP=1 $(BIN)/python -m pytest -q -W default::DeprecationWarning -n $(JOBS) --dist=worksteal tests/interop

# Preparing data with Apache Beam, by its local runner; without it `make test` skips these.
test-beam: .venv/.installed-beam-test
	$(BIN)/python -m pytest -q -W default::DeprecationWarning tests/unit/data/sources/test_beam.py

# Metrics to Weights & Biases, without a network; without it `make test` skips this.
test-wandb: .venv/.installed-wandb-test
	$(BIN)/python -m pytest -q -W default::DeprecationWarning tests/unit/train/test_wandb.py

# Kernels on this machine's GPU. With `BIN` of another environment nothing is installed. Without a GPU that can run them
# every test is skipped, with the reason.
test-gpu: $(if $(filter .venv/bin,$(BIN)),.venv/.installed-test)
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -q -rs tests/gpu

# Tasks against lm-eval, by our model in it and by its own of transformers, without a network; without lm-eval `make test`
# skips these. Deprecations are those of its dependencies.
test-harness: .venv/.installed-harness-test
	ODELM_HARNESS=1 $(BIN)/python -m pytest -q -W default::DeprecationWarning -n $(JOBS) --dist=worksteal tests/harness

# The mathematics, a part of the models and the update on the newest releases that requirements.txt allows, in an
# environment of its own; kernels are interpreted, and compiled for a card that is not there, and updates are compiled for
# TPUs that are not there (libtpu is a large package). More cases of the kernels, 16 minutes of one core:
# .venv-newest/bin/python -m pytest -m thorough tests/kernels
test-newest:
	@for python in $(NEWER); do \
		$$python -c "import ensurepip, venv" 2> /dev/null || continue; \
		$$python --version && $(MAKE) --no-print-directory test-newest-with NEWEST=$$python; exit; \
	done; echo "skipped: there is no Python 3.12 or later to try the newest stack with"

test-newest-with:
	rm -rf .venv-newest
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/pip install -q --no-compile --disable-pip-version-check -e ".[test]"
	.venv-newest/bin/python -c "import jax, flax; print('jax', jax.__version__, 'flax', flax.__version__)"
	jax=$$(.venv-newest/bin/python -c "import jax; print(jax.__version__)"); .venv-newest/bin/pip install -q --no-compile \
		--disable-pip-version-check jax-cuda12-plugin==$$jax jax-cuda12-pjrt==$$jax nvidia-cuda-nvcc-cu12 \
		|| echo "no plugin of CUDA for this jax: kernels are not compiled"
	.venv-newest/bin/pip install -q --no-compile --disable-pip-version-check -e ".[slice]" \
		|| echo "no libtpu for this machine: no update is compiled for a slice of TPUs"
	.venv-newest/bin/python -m pytest -q -n $(JOBS) --dist=worksteal -o cache_dir=.pytest_cache/newest \
		tests/math tests/kernels tests/unit/ode tests/unit/models/test_inputs.py tests/unit/models/test_attention.py \
		tests/unit/train/test_step.py tests/unit/train/test_slice.py

lint: .venv/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# What imports a package that only an extra installs.
OPTIONAL = odelm/evals/harness/model.py

# The API reference, from the docstrings; a warning is an error. Modules are named one by one, because a package's
# __all__ would hide those that it does not list, and pdoc warns of those that it had found already. Annotations are
# for pyright to check: pdoc cannot read all of those of TFDS and Optax. Matplotlib runs a program when it first
# looks for fonts on a machine, which pdoc warns of if it may not.
MODULES = $(subst /,.,$(patsubst %.py,%,$(patsubst %/__init__.py,%,$(filter-out %__main__.py $(OPTIONAL),$(sort \
	$(wildcard odelm/*.py odelm/*/*.py odelm/*/*/*.py))))))

docs: .venv/.installed-docs
	rm -rf build/docs
	PDOC_ALLOW_EXEC=1 JAX_PLATFORMS=cpu $(BIN)/python -W error::UserWarning -W "ignore:The module specification" \
		-W "ignore:Error parsing type annotation" \
		-m pdoc -o build/docs $(MODULES)

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Python compiles a module when it is first imported; compiling all of them now would take a quarter of a minute.
.venv/.installed: requirements.txt pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -e .
	touch $@

.venv/.installed-%: .venv/.installed
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -e ".[$*]"
	touch $@

clean:
	rm -rf .venv .venv-newest build runs .pytest_cache *.egg-info
