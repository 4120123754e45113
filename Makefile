# make run      train, plot and analyse: executes the notebook to runs/Session_8.ipynb and .html
# make test     run the tests, two at a time
# make test-colab   run them with Google Colab's package versions; FULL=1: with its PyTorch as well
# make results  write the tables and figures of README.md and docs/ from results/; the mistakes with DATA_ROOT=DIR
# make lint     ruff's check and format check
# make clean    delete the environments
#
# The first call installs into $(VENV). The notebook's constants are set by name:  make run EPOCHS=5 RECIPE=one_cycle

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
COLAB_PYTHON ?= python3.13
COLAB = .venv-colab$(if $(filter-out 0,$(FULL)),-full)
CONSTANTS = EPOCHS RECIPE BATCH_SIZE SEED DATA_ROOT DEVICE CHECKPOINTS PROCESSES
SETTINGS = PYTHON VENV COLAB_PYTHON COLAB_TESTS FULL

GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
$(foreach name,$(filter-out $(CONSTANTS) $(SETTINGS),$(GIVEN)),\
	$(error $(name) is not a constant. Constants are $(CONSTANTS); settings of make are $(SETTINGS)))
# The shell reads the values from its environment: it parses none of them, and make expands no dollar sign in them.
# Make removes spaces in front of a value, nothing else.
GIVEN := $(filter $(CONSTANTS),$(GIVEN))
$(foreach name,$(GIVEN),$(if $(value $(name)),,$(error $(name) is empty: write $(name)=value, or leave it out)))
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
$(if $(filter CHECKPOINTS,$(GIVEN)),$(if $(filter True False,$(value CHECKPOINTS)),,\
	$(error CHECKPOINTS is $(value CHECKPOINTS): write CHECKPOINTS=True or CHECKPOINTS=False)))
export $(GIVEN)

.PHONY: run test test-colab results lint clean

# Repeated when the requirements change.
$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Python 3.11.4 or later is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once. PyTorch's default build for Linux is several GB."
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

run: $(VENV)/installed
	mkdir -p runs
	$(BIN)/papermill Session_8.ipynb runs/Session_8.ipynb --kernel python3 --no-progress-bar \
		--stdout-file - --stderr-file - \
		$(foreach name,$(GIVEN),-$(if $(filter DATA_ROOT,$(name)),r,p) $(name) "$$$(name)")
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
	$(COLAB)/bin/python -m pytest tests/test_notebook.py -k "whole_notebook or alternative_texts" -s -q
	$(COLAB)/bin/python -m pytest -n 2 --dist loadgroup -m 'not xdist_group' -k 'not whole_notebook' $(COLAB_TESTS)

results: $(VENV)/installed
	$(BIN)/python results/build.py $(if $(value DATA_ROOT),"$$DATA_ROOT")

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-colab .venv-colab-full
