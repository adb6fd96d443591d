# Every target installs what it needs into .venv from the pinned files in requirements/, once.
# PYTHON=/path/to/python chooses the interpreter; `make clean` first to change it later.

CANDIDATES := python3.11 python3.12 python3.13 python3
PROBE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(PROBE)' >/dev/null 2>&1 && echo $$p && break; done)

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
GPU_PYTHON ?= python
RECIPE := configs/smollm2/135m-demo.yaml

# A hub or a second thread makes tests slow and irreproducible; neither is needed.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 USE_HUB_KERNELS=NO

.PHONY: demo test lint types fmt lock build clean gpu floor harness peer-tests
.DELETE_ON_ERROR:

demo: .venv/ready-demo
	$(BIN)/ssmorph convert $(RECIPE)

# pytest comes last, so that its closing line ends the output
test: lint types
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadscope

# On a machine with a card, in whatever environment has torch, triton and pytest: nothing is installed.
gpu:
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -q -p no:cacheprovider tests/kernels
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.kernels --device cuda

# The kernel tests with the oldest triton that pyproject.toml allows, in an environment of its own.
floor: .venv/ready-test
	test -d .venv-floor || $(BIN)/python -m venv .venv-floor
	echo "$(CURDIR)/$$(ls -d .venv/lib/python*/site-packages)" > $$(ls -d .venv-floor/lib/python*/site-packages)/later.pth
	.venv-floor/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps triton==3.7.1
	$(TEST_ENV) PYTHONPATH=src .venv-floor/bin/python -m pytest -q -n 2 tests/kernels

# Suites of lm-eval tasks. It brings 0.6 GB, so an environment of its own adds it to what the tests have.
harness: .venv/ready-test requirements/eval.txt
	test -d .venv-eval || $(BIN)/python -m venv .venv-eval
	echo "$(CURDIR)/$$(ls -d .venv/lib/python*/site-packages)" > $$(ls -d .venv-eval/lib/python*/site-packages)/later.pth
	.venv-eval/bin/python -m pip --disable-pip-version-check --no-input install --quiet -r requirements/eval.txt
	$(TEST_ENV) PYTHONPATH=src .venv-eval/bin/python -m pytest -q tests/stages/test_harness.py

# transformers' own mixins on our classes: make peer-tests TRANSFORMERS=/path/to/its/checkout, of the installed version.
# They have marks of their own and call what is deprecated; only they need parameterized.
peer-tests: .venv/ready-test
	test -d .venv-peer || $(PIP) --target .venv-peer parameterized==0.9.0
	$(TEST_ENV) TRANSFORMERS="$(TRANSFORMERS)" PYTHONPATH=src:.venv-peer $(BIN)/python -m pytest -q -rfx --tb=short \
		-o addopts= -o filterwarnings= -p no:cacheprovider --disable-warnings tests/peer/mixins.py

lint: .venv/ready-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/ready-test
	$(BIN)/mypy

fmt: .venv/ready-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock:
	requirements/lock.sh "$(PYTHON)"

# setuptools copies whatever an older build/ still holds into the wheel
build: .venv/ready-test
	rm -rf build dist
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
	rm -rf build

clean:
	rm -rf .venv .venv-floor .venv-peer .venv-eval build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The ready files are written last: an interrupted installation is taken up again by the next make.
.venv/ready-python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then echo "make: no Python >= 3.11 with venv; install one, or set PYTHON." >&2; exit 1; fi; \
	echo "Making .venv with $$($$python --version). With a CPU build of torch, 0.5 GB to download for the demo, 0.4 GB more for the tests."; \
	if ! $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		echo "This is not Python 3.11: pip may choose a CUDA build of torch, several GB more."; \
		echo "To use another: make clean, then make PYTHON=/path/to/python3.11"; \
	fi; \
	$$python -m venv .venv
	@touch $@

.venv/ready-demo: .venv/ready-python pyproject.toml requirements/demo.txt requirements/data.txt
	$(PIP) -r requirements/demo.txt
	$(PIP) --no-deps -r requirements/data.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/ready-test: .venv/ready-demo requirements/test.txt requirements/triton.txt
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/triton.txt
	@touch $@
