# `make demo` and `make test` do all their own set-up in .venv; a second run only does what changed. pip reads PIP_EXTRA_INDEX_URL, from
# the environment or from here (`make demo PIP_EXTRA_INDEX_URL=...`), e.g. for torch's CPU build.
PYTHON ?= python3
VENV := .venv
TPAD := $(VENV)/bin/tpad
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test slow docs results clean

demo: $(VENV)/.installed
	$(TPAD) distill
	$(TPAD) export-embeddings
	$(TPAD) train-sbr
	$(TPAD) recommend

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rs

slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m slow

results: $(VENV)/.installed-dev
	PYTHONPATH=. $(VENV)/bin/python benchmarks/all_results.py $(RESULTS)

docs: $(VENV)/.installed
	$(VENV)/bin/python docs/generate.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[faiss-cpu,serve]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[faiss-cpu,serve,dev,ablate,search]"
	touch $@

clean:
	rm -rf $(VENV) artifacts/shop
