# make check   lint and the quick tests: before each push, meant to stay under a minute on two cores
# make test    what continuous integration runs: a fresh virtual environment, all but `slow` and `gpu`

PYTHON ?= python

# The model, generation, optimizers, flags and declared versions: tests that train nothing.
QUICK = model generation device_waits optimizer versions repository demo
# Except for those that start real training runs.
TRAINS = killed_run or readme_s_first_command or training_continues

.PHONY: check test

check:
	ruff format --check .
	ruff check .
	pyrefly check
	$(PYTHON) -m pytest -n auto $(QUICK:%=tests/test_%.py) -k "not ($(TRAINS))"

test:
	bash .ci/run
