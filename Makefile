# `make demo` and `make test` on a fresh machine do everything: each makes the environment first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: env demo generate serve test soak system-packages lint format bench clean

# What comes with the repository: trained on photographs of clothes (configs/clothing), in 16 bits.
MODEL ?= models/clothing
CAPTION ?= 하의에서 기장은 미니이다. 하의에서 색상은 블루이다. 하의에서 카테고리는 팬츠이다.

env: $(READY)

# torch comes first and alone: with it installed, later packages are content with it, where a plain range would fetch
# several GB of CUDA packages on a machine without a GPU. deepspeed is source only and needs torch at build time.
# taming-transformers comes without its dependencies: the torchvision that it declares breaks transformers' RoBERTa and
# EfficientNet beside CPU torch.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gpu,serve,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt taming-transformers-rom1504
	touch $(READY)

demo: $(READY)
	$(BIN)/kodalle demo --out runs/demo

generate: $(READY)
	$(BIN)/kodalle generate $(MODEL) "$(CAPTION)" --seed 7 --out generations

serve: $(READY)
	$(BIN)/python -m serve $(MODEL)

# Two processes share what computes by itself (Triton's interpreter has one core busy); servers, browsers and their clocks
# have the machine for themselves. Both parts are run, whatever the first one finds.
test: $(READY)
	@status=0; \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore=tests/serve || status=$$?; \
	$(BIN)/python -m pytest -q tests/serve || status=$$?; \
	exit $$status

# What `make test` leaves out: an hour or so of a running server. Stops at the first bar that is missed; results are stored.
RESULTS := benchmarks/results
soak: $(READY)
	$(BIN)/python -m pytest -q -m soak
	$(BIN)/python benchmarks/serve_fuzz.py --server direct --out $(RESULTS)/serve_fuzz
	$(BIN)/python benchmarks/serve_fuzz.py --server ray --out $(RESULTS)/serve_fuzz
	$(BIN)/python benchmarks/serve_hangups.py --model $(MODEL) --server direct --out $(RESULTS)/serve_hangups
	$(BIN)/python benchmarks/serve_hangups.py --model $(MODEL) --server ray --out $(RESULTS)/serve_hangups
	$(BIN)/python benchmarks/serve_seeds.py --model $(MODEL) --out $(RESULTS)/serve_seeds
	$(BIN)/python benchmarks/serve_faults.py --model $(MODEL) --out $(RESULTS)/serve_faults
	$(BIN)/python benchmarks/serve_soak.py --server direct --out $(RESULTS)/serve_soak
	$(BIN)/python benchmarks/serve_soak.py --server ray --out $(RESULTS)/serve_soak
	$(BIN)/python benchmarks/serve_load.py --model $(MODEL) --out $(RESULTS)/serve_load

# What the tests of the page and of two hosts need besides Python: a browser with a Korean font, and `ip`. Without them, or
# without leave to install them, those tests skip and say so.
system-packages:
	@if command -v chromium >/dev/null && command -v ip >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium fonts-nanum iproute2 >/dev/null) || echo "system packages could not be installed: some tests will skip"; \
	else echo "no leave to install chromium, fonts-nanum, iproute2: some tests will skip"; fi

bench: $(READY)
	$(BIN)/python benchmarks/kernel_speed.py
	$(BIN)/python benchmarks/sample_speed.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
