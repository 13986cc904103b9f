# `make demo` and `make test` set up what they need; RGD_EXT_BUILD=none|cpu|cuda|auto chooses the build, and PYTEST has
# options of pytest.
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BUILT := build/.built
CPP := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The tests of `make wheel`, which take a minute.
QUICK := tests/ops tests/metric tests/binary tests/test_optim.py tests/test_gradients.py tests/test_monitor.py \
    $(addprefix tests/capture/test_,models.py small_layers.py steps.py)

.PHONY: demo test wheel lint lint-python lint-format lint-types lint-cpp docs bench cpp sanitize cuda clean FORCE

demo: $(BUILT)
	$(BIN)/python -m rgd_ext demo

# The two workers share the processors, so threads that wait must not spin.
test wheel: export OMP_WAIT_POLICY = passive
test: $(BUILT)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

# Source distribution, wheel and a test of the wheel; for wheels of another torch: TORCH=torch==2.11.0 VENV=.venv-2.11.
wheel: $(VENV)/.requirements
	tools/wheel.sh $(BIN)/python $(TORCH) $(or $(PYTEST),$(QUICK))

# .pre-commit-config.yaml runs the same ones.
lint: lint-python lint-format lint-types lint-cpp

lint-python: $(VENV)/.requirements
	$(BIN)/ruff check .

lint-format: $(VENV)/.requirements
	$(BIN)/ruff format --check .

lint-types: $(VENV)/.requirements
	$(BIN)/mypy

lint-cpp: $(VENV)/.requirements
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# The site, in build/docs. It is read anew each time, since Sphinx warns only of pages that it reads.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -d build/doctrees docs build/docs

bench: $(BUILT)
	$(BIN)/python -m bench kernels
	$(BIN)/python -m bench steps

cpp: CMAKE_BUILD := build/cmake
sanitize: CMAKE_BUILD := build/sanitize
sanitize: CMAKE_OPTIONS := -DRGD_EXT_ASAN=ON -DRGD_EXT_UBSAN=ON
cpp sanitize: $(VENV)/.requirements
	PATH=$(abspath $(BIN)):$$PATH cmake -B $(CMAKE_BUILD) -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python $(CMAKE_OPTIONS)
	$(BIN)/cmake --build $(CMAKE_BUILD)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure --parallel 2

# Compiles the CUDA kernels against a CUDA build of torch and runs the tests that need no GPU. In a copy, since the
# extension of one torch does not load in another.
cuda: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0;12.0
cuda:
	mkdir -p build/cuda
	git ls-files -z | xargs -0 cp --parents --update --preserve=timestamps -t build/cuda
	RGD_EXT_BUILD=cuda $(MAKE) -C build/cuda test VENV=$(abspath .venv-cuda) TORCH=torch==2.14.1

clean:
	rm -rf build $(VENV) .venv-cuda rgd_ext/_C*.so rgd_ext/_C.json *.egg-info

# What was asked for last: another choice builds anew.
build/.choice: FORCE
	@mkdir -p build
	@echo '$(RGD_EXT_BUILD) $(TORCH) $(abspath $(VENV))' | cmp -s - $@ || echo '$(RGD_EXT_BUILD) $(TORCH) $(abspath $(VENV))' > $@

# The package without kernels, for the extra that it names; `$(BUILT)` compiles them.
$(VENV)/.requirements: requirements-dev.txt pyproject.toml Makefile build/.choice
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) -r requirements-dev.txt
	RGD_EXT_BUILD=none $(BIN)/pip install --quiet --no-build-isolation --editable '.[trainers]'
	touch $@

$(VENV)/.docs: docs/requirements.txt $(BUILT)
	$(BIN)/pip install --quiet -r docs/requirements.txt
	touch $@

$(BUILT): $(VENV)/.requirements setup.py pyproject.toml $(shell find csrc -type f)
	rm -f rgd_ext/_C*.so rgd_ext/_C.json
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
