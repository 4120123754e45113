# make run      train, plot and analyse: executes the notebook to runs/Session_8.ipynb and .html
# make test     run the tests, two at a time
# make test-colab   run them with Google Colab's package versions; FULL=1: with its PyTorch as well
# make results  write the tables and figures of README.md, results/ and docs/ from the records in results/
# make lint     ruff's check and format check, and mypy over the package
# make clean    delete the environments
#
# The first call installs into $(VENV). The notebook's constants are set by name:  make run EPOCHS=5 RECIPE=one_cycle

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
COLAB_PYTHON ?= python3.13
COLAB = .venv-colab$(if $(filter-out 0,$(FULL)),-full)
CONSTANTS = EPOCHS RECIPE BATCH_SIZE SEED DATA_ROOT DEVICE CHECKPOINTS
SETTINGS = PYTHON VENV COLAB_PYTHON COLAB_TESTS FULL

# A misspelt name on the command line, such as EPOCH=5, is an error: make would ignore it.
GIVEN = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
UNKNOWN = $(filter-out $(CONSTANTS) $(SETTINGS),$(GIVEN))
$(if $(UNKNOWN),$(error $(UNKNOWN): expected constants of the notebook ($(CONSTANTS)) or settings of make ($(SETTINGS))))

.PHONY: run test test-colab results lint clean

# Repeated when the requirements change.
$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Python 3.11.4 or later is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once. PyTorch's default build for Linux is several GB."
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

# The shell sees the constants of the command line; $${X:+words} stands for the words if X is set and not empty.
# -r passes a text as it is; -y reads a number, or True and False. Write $$$$ for a dollar sign in a value.
run: $(VENV)/installed
	mkdir -p runs
	$(BIN)/papermill Session_8.ipynb runs/Session_8.ipynb --kernel python3 --no-progress-bar \
		--stdout-file - --stderr-file - \
		$${EPOCHS:+-y "EPOCHS: $$EPOCHS"} \
		$${RECIPE:+-r RECIPE "$$RECIPE"} \
		$${BATCH_SIZE:+-y "BATCH_SIZE: $$BATCH_SIZE"} \
		$${SEED:+-y "SEED: $$SEED"} \
		$${DATA_ROOT:+-r DATA_ROOT "$$DATA_ROOT"} \
		$${DEVICE:+-r DEVICE "$$DEVICE"} \
		$${CHECKPOINTS:+-y "CHECKPOINTS: $$CHECKPOINTS"}
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams runs/Session_8.ipynb
	$(BIN)/jupyter nbconvert --to html --template-file docs/notebook.html.j2 runs/Session_8.ipynb

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Colab's versions in front of the packages of $(VENV), whose PyTorch is several GB.
.venv-colab/installed: $(VENV)/installed tests/colab-requirements.txt
	$(BIN)/python -m venv --clear .venv-colab
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .venv-colab/behind.pth
	mv .venv-colab/behind.pth .venv-colab/lib/python*/site-packages
	grep -vE '^(torch|setuptools)' tests/colab-requirements.txt > .venv-colab/requirements.txt
	.venv-colab/bin/python -m pip install --disable-pip-version-check -q -r .venv-colab/requirements.txt
	touch $@

.venv-colab-full/installed: requirements.txt tests/colab-requirements.txt
	$(COLAB_PYTHON) -m venv .venv-colab-full
	.venv-colab-full/bin/python -m pip install --disable-pip-version-check -q \
		-r tests/colab-requirements.txt -r requirements.txt
	touch $@

test-colab: $(COLAB)/installed
	$(COLAB)/bin/python --version
	$(COLAB)/bin/python -m pip freeze --disable-pip-version-check | \
		grep -E '^(torch|torchvision|numpy|scipy|pandas|matplotlib|pillow|ipython|ipykernel|traitlets)=='
	$(COLAB)/bin/python -m pytest tests/test_notebook.py tests/test_make.py -k "whole_notebook or alternative_texts" -s -q
	$(COLAB)/bin/python -m pytest -n 2 --dist loadgroup -m 'not xdist_group' -k 'not whole_notebook' $(COLAB_TESTS)

results: $(VENV)/installed
	$(BIN)/python -m results.build

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf .venv .venv-colab .venv-colab-full
