# Everything works on a fresh clone with Python >= 3.11 and make; the environment is made once.
PYTHON ?= python3
BIN = .venv/bin
NPU = TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=1 \
	.venv-npu/bin/python -m qnext.lowering.softnpu.device
CLIENTS = 'openai>=3.50,<4' 'lm-eval[api]>=0.4.13,<0.5' 'litellm>=1.106,<2' 'schemathesis>=4.32,<5' \
	'aiperf>=0.13,<0.14' 'sglang-router>=0.3.2,<0.4' 'vllm-router>=0.1.17,<0.2'
QUESTION = Mia has 12 apples. She buys 7 more and then gives 5 to Tom. How many apples does Mia have now?

.PHONY: run test test-all test-npu test-clients notebooks docs lint demo clean

run: .venv/base  ## ask the demo model a question
	@$(BIN)/qnext generate --prompt "$$(printf 'Question: %s\nAnswer:' "$(QUESTION)")" --stop Question

test: .venv/dev  ## the default suite, minutes
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/dev .venv-clients/dev  ## the default suite and the slow proofs
	$(BIN)/python -m pytest -n 2

test-npu: .venv-npu/dev  ## torch_npu on the software Ascend, a 910B and an A3; needs g++ on x86-64
	$(NPU) -m pytest tests/npu -n 2
	$(NPU) --soc 9391 -m pytest tests/npu/test_steps.py tests/npu/test_errors.py tests/npu/test_ranks.py -k "fused or error or shared or travel"

test-clients: .venv-clients/dev .venv/dev  ## public clients against `qnext serve`; needs npm
	$(BIN)/python -m pytest tests/clients

notebooks: .venv/dev  ## run every notebook from its first cell to its last
	$(BIN)/python -m pytest tests/notebooks

docs: .venv/docs  ## build the site into site/
	$(BIN)/python -m mkdocs build --quiet -f website/mkdocs.yml

lint: .venv/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: .venv/dev  ## train the embedded demo model anew (docs/demo.md tells the hours)
	$(BIN)/python -m examples.train_demo

clean:
	rm -rf .venv .venv-npu .venv-clients .cache build dist site *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/base: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/base

.venv/docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@ .venv/base

.venv-npu/dev: pyproject.toml
	$(PYTHON) -m venv .venv-npu
	.venv-npu/bin/python -m pip install --quiet --upgrade pip
	.venv-npu/bin/python -m pip install --quiet --editable '.[dev,npu]'
	@touch $@

# none of them needs torch
.venv-clients/dev: Makefile
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --upgrade pip
	.venv-clients/bin/python -m pip install --quiet $(CLIENTS)
	npm install --prefix .venv-clients/node --silent --no-fund --no-audit 'openai@^6.49'
	@touch $@
