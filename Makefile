# `make` runs the whole paper, `make check` ruff and all tests, each in a virtual environment.
PYTHON ?= python3
BIN = .venv/bin

all: .venv/ready
	PYTHON=$(BIN)/python bash paper.sh

quick: .venv/ready
	QUICK=1 PYTHON=$(BIN)/python bash paper.sh

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

test: .venv/ready
	$(BIN)/python -m pytest -q

# Figures of the run in out/ and drawings, as SVG files.
figures: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-figures.txt
	$(BIN)/python -m evaluate.figures out --out docs/figures
	$(BIN)/python -m evaluate.drawings out --out docs/figures

# What paper.sh wrote, and nothing of your own.
clean:
	rm -rf $(addprefix out/,tinytown pretrain sft preferences rm rlhf instructed gatt results quick \
		summary.txt summary-beside.txt beside.log)

.venv/ready: requirements-tested.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-tested.txt
	touch $@

.PHONY: all quick check test figures clean
