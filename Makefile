# Two commands set up a fresh machine: `make demo` and `make test`. Both share one .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN := runs/demo
WHERE := --data $(RUN)/digits-s --out $(RUN)
ALL := --ckpt checkpoints/bvit-digits-s checkpoints/bvit-digits-s-te checkpoints/bvit-digits-s-reg4 $(WHERE)

.PHONY: setup demo test lint docs notebooks bench gpu gpu-collect clean

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
	$(BIN)/bvit-interp transfer --data digits-s --mode probe lora-qv --seeds 0 --epochs 6 --train-batch 16 \
		--n-train 128 --limit 100 --random-baseline --out $(RUN)/transfer
	$(BIN)/bvit-interp demo --data $(RUN)/digits-s --out $(RUN)
	$(BIN)/bvit-interp pointing-game $(ALL) --overwrite
	$(BIN)/bvit-interp report $(RUN)

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=300 notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# what README and docs take from the code
docs: setup
	$(BIN)/python docs/generate.py

notebooks: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=300 notebooks

bench: setup
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/masks.py

# What only a GPU can settle, within a time limit (DATA: folder of data sets; ARGS: --only JOB, --dry-run, ...).
# `make gpu BIN= PYTHON=python3` takes a Python that has the packages and installs nothing.
SECONDS ?= 570
OUT ?= runs/gpu
OWN := $(if $(filter .venv/bin,$(BIN)),setup)
gpu: $(OWN)
	$(if $(BIN),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --seconds $(SECONDS) --out $(OUT) \
		$(if $(DATA),--data $(DATA)) $(ARGS)

gpu-collect: $(OWN)
	$(if $(BIN),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py collect $(FOLDER) $(ARGS)

clean:
	rm -rf .venv $(RUN)
