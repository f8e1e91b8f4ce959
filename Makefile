# Everything a person or CI runs. Each target makes what it needs: on a fresh machine with Python 3.11 or later,
# `make demo` and `make test` are all there is to type.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where benchmarks put what they measure: a folder of its own for each run, since ratios hold within one run.
BENCH_OUT ?= bench/$(shell date -u +%Y%m%dT%H%M%SZ)
BENCH_OUT := $(BENCH_OUT)
MODEL ?= dense-8b
TP ?= 1
PROTO := proto/sidecar/v1/weight_sync.proto
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# Old SGLang releases that the end-to-end tests talk to. They run on the newest one's packages, so each is only a
# folder for PYTHONPATH; 0.5.15.post1 also needs the transformers of its time.
ENGINES := 0.5.20 0.5.15.post1
EXTRAS_0.5.15.post1 := transformers==5.12.1 tokenizers==0.22.2

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install engines fmt lint types proto proto-check proto-baseline demo docs test test-fast fuzz deploy-check audit faults soak fleet test-gpu bench bench-gpu check clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make .venv with this package, SGLang and all tools (about 5 minutes and 11 GB, once)

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[trainer,engine,dev]'
	touch $@

engines: $(ENGINES:%=.engines/%/.installed)  ## fetch the older SGLang releases for the end-to-end tests

.engines/%/.installed: | $(VENV)/.installed
	rm -rf .engines/$* .engines/$*.partial
	$(BIN)/python -m pip install --quiet --no-deps --target .engines/$*.partial sglang==$* $(EXTRAS_$*)
	touch .engines/$*.partial/.installed
	mv .engines/$*.partial .engines/$*

fmt: install  ## format and repair what can be repaired
	ruff format .
	ruff check --fix .
	buf format --write

lint: install  ## format, style, import directions, protobuf style
	ruff format --check .
	ruff check .
	lint-imports
	buf format --diff --exit-code
	buf lint

types: install  ## mypy, strict
	mypy
	mypy examples/*.py

proto: install  ## regenerate sidecar/v1 from proto/
	python -m grpc_tools.protoc -Iproto --python_out=. --mypy_out=. --grpc_python_out=. --mypy_grpc_out=. $(PROTO)

proto-check: install  ## generated code is current, and the contract keeps its promises
	pytest --quiet tests/unit/test_generated_code.py tests/unit/test_contract_is_kept.py

proto-baseline: install  ## freeze the contract as of this version: once per release
	buf build --exclude-source-info --output proto/baseline/v$(VERSION).binpb

audit: install  ## a bill of materials of the base install (dist/sbom.json), and known vulnerabilities in it
	./deploy/audit.sh

docs: install  ## regenerate docs/configuration.md from the settings' table
	python -m tests.docs_table

demo: install  ## a real server, the sidecar and two trainer processes, on the CPU or on GPUs
	sglang-weight-sync demo

test: install engines  ## every test that needs no GPU, with real servers on the CPU
	python -m tests -m "not gpu and not faults and not soak and not fleet"

test-fast: install  ## without the real servers
	pytest tests -m "not gpu and not e2e and not faults and not soak and not fleet" --ignore=tests/e2e

fuzz: install  ## a million hostile requests, and payloads read by SGLang's own unpickler (20 minutes)
	python -m tests.fuzz --requests 1000000 --seed 1 --processes 2

deploy-check: install  ## deploy/ by promtool, systemd, docker compose and kubectl, each where it is installed
	deploy/check.sh

faults: install engines  ## every cell of the fault matrix, and 10,000 random schedules of the coordinator
	WEIGHT_SYNC_SCHEDULES=10000 pytest tests/model --timeout 3000
	pytest tests/faults

soak: install  ## a thousand updates with a fault every twenty, on a real server under traffic
	pytest tests/soak -s

fleet: install  ## three real servers, each in a network of its own, under traffic: 50 updates, then every fault (root)
	pytest tests/fleet -s

test-gpu: install  ## on a machine with CUDA devices
	pytest tests/gpu -m gpu

bench: install  ## this against its peers on the CPU: tiny models on a real server, control, manifests, fleets (9 minutes)
	python -m benchmarks sync --model dense-tiny --out $(BENCH_OUT)
	python -m benchmarks sync --model moe-tiny --out $(BENCH_OUT)
	python -m benchmarks control --out $(BENCH_OUT)
	python -m benchmarks manifest --out $(BENCH_OUT)
	python -m benchmarks fleet --out $(BENCH_OUT)
	python -m benchmarks check $(BENCH_OUT) || true

bench-gpu: install  ## the same on a GPU machine: MODEL=dense-8b, moe-12l or moe-48l, TP=1 or 2
	python -m benchmarks sync --device cuda --model $(MODEL) --tp $(TP) --out $(BENCH_OUT)
	python -m benchmarks check $(BENCH_OUT) || true

check: lint types proto-check test  ## what CI runs

clean:  ## remove caches and build outputs; keeps .venv and .engines
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .demo dist
	find sidecar adapter tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
