# make setup | demo | test | check | bench | clean        (each sets up what it needs)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TORCH  := $(shell grep '^torch==' constraints.txt)

.PHONY: setup demo test check bench clean
setup: $(READY)

# torch comes first and by its exact version; deepspeed builds against it, without compiling any operator.
$(READY): setup.cfg constraints.txt
	@echo "setting up $(VENV) (about two minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt numpy setuptools wheel ninja py-cpuinfo psutil
	DS_BUILD_OPS=0 $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation \
	    -e '.[test,notebook,dev,bench]'
	$(BIN)/python -c "from nesa_ray.planning.partition import warm_up; warm_up()"
	$(BIN)/python -c "from nesa_ray.serving.native.build import kernels; kernels()"
	@touch $(READY)

demo: $(READY)
	$(BIN)/nesa-ray demo

# First what may run side by side, with a core for each process; then what needs the machine for itself.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not alone"
	$(BIN)/python -m pytest -m alone

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	for b in $$(grep -l -- '"--quick"' benchmarks/*.py); do echo "== $$b"; $(BIN)/python $$b --quick || exit 1; done

clean:
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
