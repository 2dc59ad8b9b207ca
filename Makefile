# The commands people and CI share. `make demo` and `make test` set everything up on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Which build of torch: cpu, or pip's, which for x86-64 is the CUDA build and takes 3 GB more (`make demo TORCH=cuda`).
TORCH  ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
PROTOS := $(sort $(shell find protos -name '*.proto'))
CPU    := $(wildcard kernels/moiety_kernels/cpu/*)

# The CPU build comes from an index of its own; where that is out of reach, pip's build is installed with the rest.
define install_torch
	@case $(TORCH) in \
	  cuda) ;; \
	  cpu) $(1)/bin/python -m pip install --quiet --no-deps --retries 1 --timeout 20 --constraint constraints.txt \
	      --index-url https://download.pytorch.org/whl/cpu torch || echo "No CPU build of torch within reach: taking pip's" ;; \
	  *) echo "TORCH=$(TORCH): must be cpu or cuda" >&2; exit 1 ;; \
	esac
endef

.PHONY: help demo test test-all conformance check parity proto bench clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, once …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install_torch,$(VENV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,dev]'
	@# Source roots on the path, too: a folder called `moiety`, as every clone is, would hide an editable package from what runs beside it.
	@printf '%s\n' "$(CURDIR)/services" "$(CURDIR)/kernels" \
	  > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/moiety-source-roots.pth"
	@# Tests read the published chat templates in trl's wheel, as data. What trl itself would need is large and not needed.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps trl
	@touch $@

$(VENV)/.kernels: $(VENV)/.installed $(CPU)
	$(BIN)/python -m moiety_kernels.cpu --optional
	@touch $@

demo: $(VENV)/.kernels ## the main job, start to end, on this machine
	$(BIN)/moiety demo

test: $(VENV)/.kernels ## the tests that every change must pass (16 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadgroup --ignore tests/e2e --ignore tests/chaos
	@# Whole systems use every core, and faults are timed: these tests run one at a time.
	$(BIN)/python -m pytest -m "not slow" tests/e2e tests/chaos

test-all: $(VENV)/.kernels ## these and the long ones
	$(BIN)/python -m pytest

# Other people's clients have an environment of their own, as they bring many packages. Where npm or its registry is missing, the
# tests in TypeScript are skipped.
$(VENV)-conformance/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV)-conformance: a few minutes, once …"
	@test -x $(VENV)-conformance/bin/python || $(PYTHON) -m venv $(VENV)-conformance
	$(call install_torch,$(VENV)-conformance)
	@# LiteLLM excludes these two pins.
	grep -vE '^(certifi|python-dateutil)==' constraints.txt > $(VENV)-conformance/constraints.txt
	$(VENV)-conformance/bin/python -m pip install --quiet --constraint $(VENV)-conformance/constraints.txt --editable '.[serve,dev,conformance]'
	@touch $@

tests/conformance/typescript/node_modules/.package-lock.json: tests/conformance/typescript/package-lock.json
	-cd tests/conformance/typescript && npm ci --ignore-scripts --no-audit --no-fund

conformance: $(VENV)-conformance/.installed tests/conformance/typescript/node_modules/.package-lock.json ## both APIs, tried with the clients that people have
	$(VENV)-conformance/bin/python -m pytest tests/conformance

check: $(VENV)/.installed ## lint, types, import rules, protos and their stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/python tests/check_stubs.py

parity: $(VENV)/.kernels ## every architecture, served and compared token for token; writes the table in docs/models.md
	$(BIN)/moiety parity --all-tiny --write docs/models.md

proto: $(VENV)/.installed ## regenerate the committed protobuf stubs
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=services --pyi_out=services --grpc_python_out=services $(PROTOS)

bench: $(VENV)/.kernels ## hop latency and serving speed beside plain transformers
	$(BIN)/moiety bench hop
	$(BIN)/moiety bench serve

clean: ## remove the virtual environments and caches
	rm -rf $(VENV) $(VENV)-conformance tests/conformance/typescript/node_modules tests/conformance/typescript/build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
