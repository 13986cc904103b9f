# `make demo` and `make test` set up what they need; RGD_EXT_BUILD=none|cpu|cuda|auto chooses the build.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
CPP := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint bench cpp clean

demo: $(BUILT)
	$(BIN)/python -m rgd_ext demo

test: $(BUILT)
	$(BIN)/python -m pytest

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: $(BUILT)
	$(BIN)/python -m bench kernels

cpp: $(VENV)/.requirements
	$(BIN)/cmake -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

clean:
	rm -rf build $(VENV) rgd_ext/_C*.so *.egg-info

$(VENV)/.requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

$(BUILT): $(VENV)/.requirements setup.py pyproject.toml $(shell find csrc -type f)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
