# On a fresh machine every target creates the environment first. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env requirements train demo generate serve test test-fast package-test soak system-packages lint format bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

# What comes with the repository: trained on photographs of clothes (configs/clothing), in 16 bits.
MODEL ?= models/clothing
CAPTION ?= 하의에서 기장은 미니이다. 하의에서 색상은 블루이다. 하의에서 카테고리는 팬츠이다.

env: $(READY)  ## Python environment in .venv, exact versions, files checked by hash

# Every file is checked against a hash in requirements/ but torch's: which build of that version comes (CUDA's or the CPU's)
# is the package index's to say; requirements/torch.txt has the hashes of PyPI's. What follows torch is source that needs
# torch to build (deepspeed), or declares packages that it must not bring: taming-transformers' torchvision breaks
# transformers' RoBERTa and EfficientNet beside CPU torch.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
$(READY): pyproject.toml constraints.txt $(wildcard requirements/*.txt kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --require-hashes -r requirements/build.txt
	$(PIP_INSTALL) --require-hashes --no-deps --no-build-isolation -r requirements/dev.txt
	$(PIP_INSTALL) -c constraints.txt torch
	DS_BUILD_OPS=0 $(PIP_INSTALL) --require-hashes --no-deps --no-build-isolation -r requirements/after-torch.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $(READY)

# Exact versions come from constraints.txt; the hashes are those of every file that PyPI has of each version. dev.txt leaves out
# torch and the CUDA packages that only its GPU build needs.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate -c constraints.txt \
	--custom-compile-command "make requirements"
requirements: $(READY)  ## requirements/*.txt anew, after a change of pyproject.toml or constraints.txt
	printf '%s\n' pip setuptools wheel | $(COMPILE) - -o requirements/build.txt
	echo torch | $(COMPILE) - -o requirements/torch.txt
	printf '%s\n' deepspeed taming-transformers-rom1504 | $(COMPILE) --no-deps - -o requirements/after-torch.txt
	$(COMPILE) pyproject.toml --extra serve -o requirements/serve.txt
	$(COMPILE) pyproject.toml --extra dev -o requirements/dev.txt --no-emit-package torch --no-emit-package deepspeed \
		$$(sed -nE 's/^((nvidia|cuda)-[a-z0-9-]+)==.*/--no-emit-package \1/p' requirements/torch.txt)

# OPTIONS: e.g. OPTIONS="--minutes 90"
OUT ?= runs/$(notdir $(patsubst %/,%,$(PHOTOS)))
OPTIONS ?=
train: $(READY)  ## from captioned images in PHOTOS to a model with a report in OUT
	@test -n "$(PHOTOS)" || { echo "error: PHOTOS: (nothing): give a folder, e.g. make train PHOTOS=photos"; exit 2; }
	$(BIN)/kodalle train "$(PHOTOS)" --out "$(OUT)" $(OPTIONS)

demo: $(READY)  ## train and evaluate on drawn garments: the whole pipeline, small
	$(BIN)/kodalle demo --out runs/demo

generate: $(READY)  ## images of CAPTION with MODEL
	$(BIN)/kodalle generate $(MODEL) "$(CAPTION)" --seed 7 --out generations

serve: $(READY)  ## page and API of MODEL on port 8000
	$(BIN)/kodalle serve $(MODEL)

# Two processes share what computes by itself; then two browsers, which mostly wait, share the tests of the page, by files,
# whose fixtures are a server and a browser; then the other tests marked `exclusive` (Ray, launchers) have the machine for
# themselves. All parts are run, whatever the first one finds.
test: $(READY)  ## all tests: 11 minutes on two quiet cores
	@status=0; \
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not soak and not exclusive" || status=$$?; \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not soak" tests/serve/page || status=$$?; \
	$(BIN)/python -m pytest -q -m "exclusive and not soak" --ignore=tests/serve/page || status=$$?; \
	exit $$status

test-fast: $(READY)  ## unit tests alone: a minute on two cores
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not soak and not exclusive and not slow"

package-test: $(READY)  ## the wheel, installed outside the checkout: generates, trains, serves
	$(BIN)/python -m pytest -q -m package

# Stops at the first failure; results are stored.
RESULTS := benchmarks/results
soak: $(READY)  ## an hour or so: tests and benchmarks that `make test` leaves out
	$(BIN)/python -m pytest -q -m soak
	$(BIN)/python benchmarks/serve_fuzz.py --server direct --out $(RESULTS)/serve_fuzz
	$(BIN)/python benchmarks/serve_fuzz.py --server ray --out $(RESULTS)/serve_fuzz
	$(BIN)/python benchmarks/serve_floods.py --server direct --out $(RESULTS)/serve_floods
	$(BIN)/python benchmarks/serve_hangups.py --model $(MODEL) --server direct --out $(RESULTS)/serve_hangups
	$(BIN)/python benchmarks/serve_hangups.py --model $(MODEL) --server ray --out $(RESULTS)/serve_hangups
	$(BIN)/python benchmarks/serve_seeds.py --model $(MODEL) --out $(RESULTS)/serve_seeds
	$(BIN)/python benchmarks/serve_faults.py --model $(MODEL) --out $(RESULTS)/serve_faults
	$(BIN)/python benchmarks/serve_soak.py --server direct --out $(RESULTS)/serve_soak
	$(BIN)/python benchmarks/serve_soak.py --server ray --out $(RESULTS)/serve_soak
	$(BIN)/python benchmarks/serve_load.py --model $(MODEL) --out $(RESULTS)/serve_load
	$(BIN)/python benchmarks/train_faults.py --out $(RESULTS)/train_faults
	$(BIN)/python benchmarks/train_hosts.py --out $(RESULTS)/train_hosts

# What the tests of the page and of two hosts need besides Python: a browser with a Korean font, `ip`, and where there is node
# the TypeScript that checks the page's types and OpenAI's client. Without them, or without leave to install them, those tests skip and
# say so.
system-packages:  ## Chromium, a Korean font, ip, TypeScript and a client for node, for the tests that need them
	@if command -v chromium >/dev/null && command -v ip >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium fonts-nanum iproute2 >/dev/null) || echo "system packages could not be installed: some tests will skip"; \
	else echo "no leave to install chromium, fonts-nanum, iproute2: some tests will skip"; fi
	@for place in tests/serve/page/typescript tests/serve/clients/node; do \
	  if [ -d $$place/node_modules ]; then :; \
	  elif command -v npm >/dev/null; then \
	    npm ci --silent --no-audit --no-fund --prefix $$place || echo "$$place could not be installed: a test will skip"; \
	  else echo "no npm for $$place: a test will skip"; fi; \
	done

bench: $(READY)  ## speed of kernels and of generation
	$(BIN)/python benchmarks/kernel_speed.py
	$(BIN)/python benchmarks/sample_speed.py

lint: $(READY)  ## ruff, mypy, import-linter, hashes of requirements
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_dependency_hashes.py

format: $(READY)  ## what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment, runs and caches
	rm -rf $(VENV) build runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
