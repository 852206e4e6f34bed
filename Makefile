# Two commands: `make demo` and `make test`. Each sets up .venv first, and again when the package's metadata changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := zept_demo
RESULTS := benchmarks/results/zero_shot.csv
# make demo FULL=1 trains every method with three seeds on the phantom of size small: many hours without a GPU.
FULL_RUN := zept_demo_full
RUNS = $(FULL_RUN)/small/runs/3d_fullres_15x250
RAW = $(FULL_RUN)/small/nnUNet_raw/Dataset900_ZePTPhantom
# Test files run side by side, one thread each. make test WORKERS=0 runs them in this process, one after the other.
WORKERS ?= 2

.PHONY: demo test lint install clean

ifeq ($(FULL),1)
demo: $(STAMP)
	$(BIN)/python benchmarks/zero_shot.py --size small --seeds 3 --epochs 15 --iterations 250 \
		--workspace $(FULL_RUN) --results $(FULL_RUN)/zero_shot.csv
	$(BIN)/zept report -o $(FULL_RUN)/report.html --overwrite -r $(RAW)/labelsTs --images $(RAW)/imagesTs \
		$(foreach m,zept any_tumor_rel any_tumor_plus,--method $(m)=$(RUNS)/$(m)/seed0/report:$(RUNS)/$(m)/seed0/test) \
		--results $(FULL_RUN)/zero_shot.csv --classes "liver tumor" "kidney tumor" "spleen tumor"
else
demo: $(STAMP)
	$(BIN)/zept demo -o $(DEMO) --results $(RESULTS) --overwrite
endif

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(DEMO) $(FULL_RUN) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
