# Everything on a fresh machine: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help install docs demo test test-slow check benchmarks clean

help:
	@echo "make install     install flyweight into $(VENV)"
	@echo "make demo        compress the Fashion-MNIST teacher (installation, then about five minutes)"
	@echo "make test        the fast tests, linting and types"
	@echo "make test-slow   the slow tests"
	@echo "make docs        the pages of docs/ into build/docs"
	@echo "make benchmarks  the demo over seeds, overhead, scale (docs/benchmarks.md names all scripts)"

$(READY): pyproject.toml constraints.txt
	@echo "== Installing flyweight into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

install: $(READY)

demo: $(READY)
	@echo "== Searching: four minutes of preparation and trials, then the finalists are measured alone"
	$(BIN)/flyweight search examples/fashion_mnist/search.yaml --out $(RUN)
	@echo "== Trials: $(BIN)/mlflow ui --backend-store-uri sqlite:///examples/fashion_mnist/mlflow.db"

test: $(READY) check
	@echo "== Fast tests"
	$(BIN)/pytest -m "not slow"

test-slow: $(READY)
	@echo "== Slow tests"
	$(BIN)/pytest -m slow

check: $(READY)
	@echo "== Lint and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/types/flyweight
	@for room in spaces kernels compressors search; do ln -sfn ../../../$$room build/types/flyweight/$$room; done
	$(BIN)/mypy build/types/flyweight

docs: check
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== Open build/docs/index.html"

benchmarks: $(READY)
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/scale.py

clean:
	rm -rf $(VENV) build
