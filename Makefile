# Two commands set up a fresh machine: `make demo` and `make test`. Both share one .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN := runs/demo
CKPT := $(wildcard checkpoints/bvit-digits-s*)

.PHONY: setup demo test lint notebooks bench clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

# the embedded data goes through the same loader as ImageNet-S
demo: setup
	rm -rf $(RUN)
	$(BIN)/bvit-interp data export digits-s $(RUN)/digits-s --limit 300
	$(BIN)/bvit-interp energy-rank --ckpt $(CKPT) --data $(RUN)/digits-s --out $(RUN)
	$(BIN)/bvit-interp rank-sweep --ckpt $(CKPT) --data $(RUN)/digits-s --out $(RUN)
	$(BIN)/bvit-interp pointing-game --ckpt $(CKPT) --data $(RUN)/digits-s --out $(RUN)
	$(BIN)/bvit-interp step-accuracy --ckpt $(CKPT) --data $(RUN)/digits-s --out $(RUN)
	$(BIN)/bvit-interp evaluate --ckpt $(CKPT) --data $(RUN)/digits-s --out $(RUN)
	$(BIN)/bvit-interp report $(RUN)

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

notebooks: setup
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

bench: setup
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv $(RUN)
