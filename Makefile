# The README's two commands. Everything is made inside .venv; nothing else needs to be installed (Python 3.11).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/quickstart

.PHONY: install dev quickstart test docs-sync clean

# What the quickstart and every notebook need.
$(VENV)/.installed: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[notebooks,emoji]'
	touch $@

# The same, and what the tests and an editor of the notebooks need.
$(VENV)/.installed-dev: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[notebooks,emoji,slurm,remote,dev]'
	touch $(VENV)/.installed $@

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# Generate EmojiMotion, pre-train, fine-tune, compare, search: about a quarter of an hour on two CPU cores.
quickstart: install
	mkdir -p $(RUN)
	$(BIN)/papermill --log-output --no-progress-bar nbs/quickstart.ipynb $(RUN)/quickstart.ipynb -p out_dir $(abspath $(RUN)) $(ARGS)
	$(BIN)/python .ci/figure.py $(RUN)/quickstart.ipynb $(RUN)/quickstart.png
	@echo "read $(RUN)/quickstart.ipynb, $(RUN)/results.json"

# Everything that CI runs: the library's notebooks, all of them, then the tests, which execute the guides and the experiments' quick runs.
test: dev
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python .ci/notebooks.py --n_workers 2
	OMP_NUM_THREADS=1 timeout 3000 $(BIN)/python -m pytest tests -n 2 --dist loadfile -q --durations 10

# What must be run after editing notebooks; the tests fail where it would change something.
docs-sync: dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/figure.py nbs/quickstart.ipynb nbs/images/quickstart.png
	$(BIN)/python .ci/rooms.py
	$(BIN)/python .ci/readme.py

clean:
	rm -rf build dist *.egg-info
	find umt -name __pycache__ -prune -exec rm -rf {} +
