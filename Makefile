# Two commands for a fresh machine: `make demo` and `make test`. Each sets up .venv with pinned versions first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-oldest slow notebooks docs lint format bench experiments wheel clean

demo: .venv/.stamp
	.venv/bin/ppl-lm fit tilted --output-dir runs/demo --overwrite

# Random order comes from pytest-randomly, warnings are errors by pyproject.toml; one thread for each of two workers. Tests that
# share a run folder stay with one worker (`xdist_group`).
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup -rs

# `make test CHECKED=1`: every annotation is checked at every call, shapes and dtypes too, which takes three times as long; with
# CHECKED=5 in one of five tests, others at each run. Whole numbers pass for float, as they do for type checkers; which item of a
# list is looked at is not random, or tests would use up Python's random state.
CHECK = --jaxtyping-packages=ppl_lm,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_random=False))

test: .venv/.stamp-test
	$(PYTEST) -m "not slow and not notebook" $(if $(CHECKED),"$(CHECK)" --checked=$(CHECKED))

# The same with the lowest version of every direct dependency, on purpose and not in CI: torch of that age brings 6 GB of CUDA.
# Libraries of that age warn of much that is none of our code's, so warnings are no errors here.
test-oldest: .venv-oldest/.stamp
	.venv-oldest/bin/python -m pip list --format freeze | grep -iE '^(torch|transformers|pyro-ppl|arviz|numpy|scipy|matplotlib|networkx)='
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadgroup -rs -m "not slow and not notebook" -o filterwarnings=default

slow: .venv/.stamp-test
	$(PYTEST) -m slow

notebooks: .venv/.stamp-test
	$(PYTEST) tests/test_tutorials.py

# The site, in runs/site: its pages, the notebooks, the reference, and the gallery, which is drawn meanwhile. A link that leads
# nowhere is an error.
docs: .venv/.stamp-docs
	OMP_NUM_THREADS=2 NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet --config-file tutorials/site/mkdocs.yml
	@echo "runs/site/index.html"

lint: .venv/.stamp-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/.stamp-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/.stamp-test
	.venv/bin/python -m pytest -s -p no:randomly -o python_files='bench_*.py' tests/benchmarks
	.venv/bin/python tests/benchmarks/picture.py

# The paper's claims, by enumeration: minutes, two at a time. Fails if one does not hold.
SHORT = from ppl_lm.experiments.__main__ import SHORT; print(*SHORT, sep="\n")

experiments: .venv/.stamp
	names=$$(.venv/bin/python -c '$(SHORT)') && echo "$$names" | OMP_NUM_THREADS=1 xargs -P 2 -I NAME sh -c \
		'text=$$(.venv/bin/python -m ppl_lm.experiments NAME); status=$$?; printf "%s\n\n" "$$text"; exit $$status'

wheel: .venv/.stamp-test
	rm -rf build dist
	.venv/bin/python -m build --wheel

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, so that a CPU wheel at hand is taken before anything asks for torch with CUDA.
.venv/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version); ppl_lm needs Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@echo "installing into .venv; the first time takes some minutes"
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

.venv/.stamp-test: .venv/.stamp
	$(PIP) --editable '.[test]'
	touch $@

.venv-oldest/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/python -m uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[test]'
	touch $@

.venv/.stamp-docs: .venv/.stamp-test
	$(PIP) --editable '.[test,docs]'
	touch $@
