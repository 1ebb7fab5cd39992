# The README's two commands. Everything is made inside .venv; nothing else needs to be installed (Python 3.11).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/quickstart

.PHONY: install dev quickstart test docs-sync clean

$(VENV)/.installed: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $(VENV)/.installed $@

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# Generate EmojiMotion, pre-train, fine-tune, compare: retrieve: about a quarter of an hour on two CPU cores.
quickstart: install
	mkdir -p $(RUN)
	$(BIN)/papermill --log-output --no-progress-bar nbs/quickstart.ipynb $(RUN)/quickstart.ipynb -p out_dir $(abspath $(RUN)) $(ARGS)
	@echo "read $(RUN)/quickstart.ipynb, $(RUN)/results.json"

# Everything that CI runs: the library notebooks, then the tests (repository checks and the experiments' quick runs among them).
test: dev
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/nbdev_test --file_re '\d\d_.*' --n_workers 2 --timing
	OMP_NUM_THREADS=1 timeout 3000 $(BIN)/python -m pytest tests -n 2 --dist loadfile -q --durations 10

# What must be run after editing notebooks; the tests fail where it would change something.
docs-sync: dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/readme.py

clean:
	rm -rf build dist *.egg-info umt/__pycache__
