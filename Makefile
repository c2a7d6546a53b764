VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo test test-slow course lint docs dist clean

# Everything pinned, into a virtual environment of its own.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs,demo,course]"
	touch $@

# Trains on the embedded shapes for six minutes, then samples and checks the model. Threads wait for each other awake
# (OMP_WAIT_POLICY), as there is nothing else to do.
demo: $(VENV)/.installed
	OMP_WAIT_POLICY=active $(BIN)/hf_genmod train cfg --resolution 24 --patch_size 3 --block_out_channels 64 128 \
		--sampling_steps 0 --max_train_minutes 6 --output_dir runs/shapes
	$(BIN)/python examples/demo.py --model runs/shapes

# One process for each core, which takes whole files: what the tests of a file share is made once.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(CORES) --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The notebooks of the course from top to bottom, with each figure into docs/images.
course: $(VENV)/.installed
	COURSE_FIGURES=docs/images $(BIN)/python -m pytest -m slow tests/test_course.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff check --quiet --preview --select PLW1514 src examples  # files are opened with an encoding
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The pages of docs/ as a site, in site/. A link to nowhere, or an argument that only its docstring has, is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel and the source distribution, as PyPI takes them, in dist/.
dist: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist site
