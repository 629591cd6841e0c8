# The one interface for people and for CI. PYTHON may name any Python 3.11 to 3.13 with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SLIDES ?=
DATASET ?=
SEED ?= 0
SET ?=
OUT ?= quickstart-run

.PHONY: install quickstart test test-slow chaos check bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python jobs/quickstart.py --out "$(OUT)" --seed "$(SEED)" $(if $(SLIDES),--slides "$(SLIDES)") \
	    $(if $(DATASET),--dataset "$(DATASET)") $(if $(SET),--set "$(SET)")

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

chaos: install
	$(BIN)/python -m pytest -m slow -s tests/chaos --chaos-seed "$(SEED)"

check: install
	$(BIN)/ruff format --check platform jobs tests
	$(BIN)/ruff check platform jobs tests
	$(BIN)/mypy

bench: install
	$(BIN)/python -m histoscale.bench $(NAME)

clean:
	rm -rf $(VENV) .swift-venv .mlflow-venv quickstart-run build .mypy_cache .pytest_cache .ruff_cache
