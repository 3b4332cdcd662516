# Every target sets up what it needs in $(VENV); a second run does nothing twice.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test verify lint docs bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo ## stream a real video through a ResNet-18 on two cores, beside plain PyTorch
	@$(BIN)/python examples/demo_video.py

test: $(VENV)/.stamp-dev lint ## linters, types and the quick tests
	@$(BIN)/python -m pytest -m "not slow"

verify: $(VENV)/.stamp-dev lint ## everything, the long matrices included
	@$(BIN)/python -m pytest

lint: $(VENV)/.stamp-dev ## style, types and import rules
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { $(BIN)/ruff format --check .; exit 1; }
	@out=$$($(BIN)/pyright 2>&1) || { echo "$$out"; exit 1; }
	@out=$$($(BIN)/lint-imports 2>&1) || { echo "$$out"; exit 1; }

docs: $(VENV)/.stamp-dev ## the documentation, in site/
	@DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.stamp-dev ## the speed claims, measured on this machine (minutes)
	@$(BIN)/python -m bench.stream

clean: ## remove what the targets made, the virtual environment excepted
	@rm -rf build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path '*/.venv/*' -prune -exec rm -rf {} +

# The development environment can run the demo too, so it leaves both stamps.
$(VENV)/.stamp-dev: pyproject.toml .ci/setup
	@.ci/setup "$(VENV)" "$(PYTHON)" -e '.[dev]'
	@touch "$(VENV)/.stamp-demo" $@

$(VENV)/.stamp-demo: pyproject.toml .ci/setup
	@.ci/setup "$(VENV)" "$(PYTHON)" -e '.[video]' 'transformers>=4.57'
	@touch $@
