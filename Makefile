# `make` runs the whole paper, `make test` the tests; both in a virtual environment of their own.
PYTHON ?= python3
BIN = .venv/bin

all: .venv/ready
	PYTHON=$(BIN)/python bash paper.sh

test: .venv/ready
	$(BIN)/python -m pytest -q test_llama2.py

clean:
	rm -rf out

.venv/ready: requirements-tested.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-tested.txt
	touch $@

.PHONY: all test clean
