# Two commands set up a fresh machine: `make demo` and `make test`. Both share one .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN := runs/demo
WHERE := --data $(RUN)/digits-s --out $(RUN)
ONE := --ckpt checkpoints/bvit-digits-s $(WHERE)
ALL := --ckpt checkpoints/bvit-digits-s checkpoints/bvit-digits-s-te checkpoints/bvit-digits-s-reg4 $(WHERE)

.PHONY: setup demo test lint notebooks bench gpu gpu-collect clean

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
	$(BIN)/bvit-interp features $(ONE) --limit 100 --iterations 20 --n-neurons 2 --steps 1 3 6 12
	$(BIN)/bvit-interp pointing-game $(ALL)
	$(BIN)/bvit-interp energy-rank $(ALL)
	$(BIN)/bvit-interp rank-sweep $(ALL) --ranks 16 32 64 128
	$(BIN)/bvit-interp step-accuracy $(ALL)
	$(BIN)/bvit-interp trajectories $(ONE) --limit 80
	$(BIN)/bvit-interp dynamics $(ALL) --limit 80
	$(BIN)/bvit-interp evaluate $(ALL)
	$(BIN)/bvit-interp early-exit train --limit 1000 --out $(RUN)/exits
	$(BIN)/bvit-interp early-exit $(ONE) --exits $(RUN)/exits
	$(BIN)/bvit-interp transfer --data digits-s --mode probe lora-qv --seeds 0 --epochs 6 --train-batch 16 \
		--n-train 128 --limit 100 --random-baseline --out $(RUN)/transfer
	$(BIN)/bvit-interp attention $(ALL) --limit 80
	$(BIN)/bvit-interp cost $(ALL)
	$(BIN)/bvit-interp selectivity $(ONE) --limit 60 --n-ablated 2 --random-units 1
	$(BIN)/bvit-interp patching $(ONE) --limit 16
	$(BIN)/bvit-interp ablation $(ONE) --limit 40 --n-ablated 4 --methods mean --groups 0
	$(BIN)/bvit-interp lens $(ONE) --limit 60 --n-fit 100 --iterations 5
	$(BIN)/bvit-interp stability $(ONE) --limit 16 --n-jacobian 1 --steps 13 --jacobian-steps 1 --leading 1 --iterations 3
	$(BIN)/bvit-interp step-attribution $(ONE) --limit 24 --folds 4 --methods magnitude stepwise random --sparsities 0.5
	$(BIN)/bvit-interp schedule $(ONE) --limit 40 --n-scored 8 --runs 6 24
	$(BIN)/bvit-interp circuits $(ONE) --limit 8 --n-fit 16 --fractions 0.5 --draws 1
	$(BIN)/bvit-interp report $(RUN)

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=300 notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

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
