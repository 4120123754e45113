# make run      train, plot and analyse: executes the notebook to runs/Session_8.ipynb and .html
# make test     run the tests, two at a time
# make results  write the tables and figures of README.md and docs/ from results/; the mistakes with DATA_ROOT=DIR
# make lint     ruff's check and format check
# make clean    delete the environment
#
# The first call installs into $(VENV). The notebook's constants are set by name:  make run EPOCHS=5 RECIPE=one_cycle

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTANTS = EPOCHS RECIPE BATCH_SIZE SEED DATA_ROOT DEVICE CHECKPOINTS PROCESSES

.PHONY: run test results lint clean

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
		$(foreach name,$(CONSTANTS),$(if $(findstring command,$(origin $(name))),-p $(name) '$($(name))'))
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams runs/Session_8.ipynb
	$(BIN)/jupyter nbconvert --to html runs/Session_8.ipynb

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup

results: $(VENV)/installed
	$(BIN)/python results/build.py $(DATA_ROOT)

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
