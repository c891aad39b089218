# Any Python from 3.12 on will do: `make PYTHON=python3.13 install` picks another one.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed
LIBTPU := $(VENV)/libtpu

.PHONY: install demo test test-slow bench lint types docs tpu-check tpu-check-short clean

install: $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/recycled demo --out demo_out

test: $(STAMP)
	$(RUN) pytest -n auto

# Runs that are killed, over and over: minutes.
test-slow: $(STAMP)
	$(RUN) pytest -m slow

# Minutes for the embedded model, most of an hour for the other. With PyTorch installed, --peer hf times transformers too.
bench: $(STAMP)
	$(RUN) eval bench --config configs/eval/bench_cpu.yaml
	$(RUN) eval bench --config configs/eval/bench_cpu_embedded.yaml

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(STAMP)
	$(RUN) pyright

# The site, into build/site; `make test` builds it too. The variable silences an announcement of the theme's.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

# Every operation and decode program through the TPU compiler, for four chips, and the train step of every config for a
# pod; a TPU is not needed. Writes docs/tpu_static and docs/tpu_pods.
tpu-check: $(STAMP) $(LIBTPU)
	status=0; export PYTHONPATH=$(LIBTPU); $(RUN) tpu_check || status=1; $(RUN) tpu_check.pods || status=1; exit $$status

# One chip and the main operations, for continuous integration; writes nothing.
tpu-check-short: $(STAMP) $(LIBTPU)
	PYTHONPATH=$(LIBTPU) $(RUN) tpu_check --short

clean:
	rm -rf $(VENV) build dist *.egg-info demo_out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is the last thing written, so an interrupted installation is taken up again. An environment that still
# works is brought up to date in place; only one whose interpreter is gone or too old is replaced.
# setuptools comes first and the build is not isolated, so that it too is the version that constraints.txt pins.
$(STAMP): pyproject.toml constraints.txt .python-version
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || \
	  { echo "recycled-jax needs Python 3.12 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
	         "install one and name it: make PYTHON=python3.12 install" >&2; exit 1; }
	$(PYTHON) -m venv $$($(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || echo --clear) $(VENV)
	@echo "installing into $(VENV): some minutes, 4 GB" >&2
	$(RUN) pip install --quiet --constraint constraints.txt setuptools
	$(RUN) pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,train,eval,docs]'
	@touch $@

# The TPU compiler lies beside the environment, not in it: there, JAX would look for a TPU whenever it starts.
$(LIBTPU): $(STAMP)
	$(RUN) pip install --quiet --constraint constraints.txt --no-deps --target $@.partial libtpu
	rm -rf $@ && mv $@.partial $@
	@touch $@
