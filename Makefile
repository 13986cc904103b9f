# `make demo` and `make test` set up what they need; RGD_EXT_BUILD=none|cpu|cuda|auto chooses the build.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
CPP := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint bench cpp sanitize clean

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
	$(BIN)/python -m bench steps

cpp: CMAKE_BUILD := build/cmake
sanitize: CMAKE_BUILD := build/sanitize
sanitize: CMAKE_OPTIONS := -DRGD_EXT_ASAN=ON -DRGD_EXT_UBSAN=ON
cpp sanitize: $(VENV)/.requirements
	PATH=$(abspath $(BIN)):$$PATH cmake -B $(CMAKE_BUILD) -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python $(CMAKE_OPTIONS)
	$(BIN)/cmake --build $(CMAKE_BUILD)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure

clean:
	rm -rf build $(VENV) rgd_ext/_C*.so *.egg-info

$(VENV)/.requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

$(BUILT): $(VENV)/.requirements setup.py pyproject.toml $(shell find csrc -type f)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
