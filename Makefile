# Every target sets up .venv when needed. README shows the same commands for those without make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp-installed
INDEX  := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)

.DEFAULT_GOAL := help
.PHONY: help setup tour train test lab export check notebooks weights claims clap-env browser-deps

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo "CPU=1 takes the CPU build of torch on Linux; PYTHON=... picks the interpreter (3.11 or newer)"

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INDEX) -c constraints.txt -e '.[dev]'
	$(BIN)/python -c "import librosa, numpy; librosa.feature.melspectrogram(y=numpy.zeros(2048, 'float32'))"
	touch $@

setup: $(STAMP)  ## make .venv with everything in it

tour: $(STAMP)  ## prompt to sound with the shipped weights: out/tour.wav and out/tour.png
	$(BIN)/audiorepro tour

train: $(STAMP)  ## train your own AudioLDM 2 at toy scale (about half an hour on 2 free cores); SYSTEM=tango, tokenlm, all
	$(BIN)/audiorepro train$(if $(SYSTEM), --system $(SYSTEM))

test: $(STAMP)  ## all tests, then every lesson in a fresh kernel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=300 nbs --ignore=nbs/exercises --ignore=nbs/solutions -n 2 --dist worksteal

lab: $(STAMP)  ## JupyterLab on the lessons
	$(BIN)/jupyter lab --notebook-dir=nbs

export: $(STAMP)  ## notebooks -> package, with docstrings made of the comments on each parameter
	$(BIN)/python tests/export.py

check: $(STAMP)  ## clean, generate exercises, export, lint, notebooks in step with the package and their outputs
	$(BIN)/nbdev_clean
	$(BIN)/python tests/lessons.py exercises
	$(BIN)/python tests/export.py
	$(BIN)/ruff check audiorepro tests setup.py
	$(BIN)/python tests/lessons.py stale
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_style.py

notebooks: $(STAMP)  ## execute the lessons in fresh kernels and keep their outputs (NB=33 for one)
	OMP_NUM_THREADS=1 $(BIN)/python tests/lessons.py run $(NB)

weights: $(STAMP)  ## remake the shipped weights at full budget (hours of CPU, minutes on a GPU; resumable)
	$(BIN)/audiorepro train --system all --budget full --ship

claims: $(STAMP)  ## run what is missing of the registered claims, one arm and seed at a time (hours of CPU; may be killed)
	$(BIN)/audiorepro claims

clap-env: $(STAMP)  ## laion_clap in an environment of its own (.venv-clap, 1.8 GB), compared with ours
	$(PYTHON) tests/clap_env.py make
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_clap_env.py

browser-deps: $(STAMP)  ## Chromium for tests/test_browser.py, by apt-get; on other systems it says what to install
	@sh tests/browser_deps.sh $(BIN)/python
