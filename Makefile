# PPEC: everything a person or CI runs. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# The distribution's Python: the one that hosts have, and that sees the distribution's packages.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
UV ?= $(firstword $(shell command -v uv 2>/dev/null) build/bootstrap/bin/uv)
VENV := .venv
BIN := $(VENV)/bin
# What `make demo` starts: HYPERVISOR=libvirt|fake, GUEST=small|debian.
HYPERVISOR ?= libvirt
GUEST ?= small
COUNT ?= 6
PYTEST_ARGS ?=
BENCH ?=

# uv also builds releases; the bootstrapped one serves where the machine has none.
export PATH := $(CURDIR)/$(BIN):$(PATH):$(CURDIR)/build/bootstrap/bin
# A site's own certificate authorities count: package registries are often reached through a mirror.
export UV_SYSTEM_CERTS ?= true

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

build/bootstrap/bin/uv:
	@$(PYTHON) -m venv build/bootstrap 2>/dev/null || { echo "make: needs python3-venv (apt-get install python3-venv) or uv on the PATH" >&2; exit 1; }
	build/bootstrap/bin/pip install --quiet --disable-pip-version-check uv

# What runs PPEC and its demo, without the tools of development.
$(VENV)/.run-stamp: pyproject.toml uv.lock | $(UV)
	@$(UV) sync --quiet --locked --inexact --no-dev --all-extras --python $(PYTHON)
	touch $@

# Development adds linters, test tools and libvirt's binding (built from source, hence the packages).
$(VENV)/.dev-stamp: pyproject.toml uv.lock lab/ppec_lab/packages.py
	@PYTHONPATH=lab $(PYTHON) -m ppec_lab.packages --install
	$(MAKE) --no-print-directory $(VENV)/.run-stamp
	$(UV) sync --quiet --locked --all-extras --python $(PYTHON)
	touch $(VENV)/.run-stamp $@

.PHONY: setup
setup: $(VENV)/.dev-stamp ## Install what development and tests need (Debian packages, locked Python environment)

.PHONY: demo
demo: ## Six VMs on three real hosts, from nothing (HYPERVISOR=fake: one local host, no root; GUEST=debian: a Debian cloud image)
ifeq ($(HYPERVISOR),fake)
	@$(MAKE) --no-print-directory $(VENV)/.run-stamp
else
	@PYTHONPATH=lab $(PYTHON) -m ppec_lab.requirements --before-install
	PYTHONPATH=lab $(PYTHON) -m ppec_lab.packages --install --group python --group demo
	PYTHONPATH=lab $(PYTHON) -m ppec_lab.requirements
	$(MAKE) --no-print-directory $(VENV)/.run-stamp
endif
	$(BIN)/python -m ppec_lab.demo up --hypervisor $(HYPERVISOR) --guest $(GUEST) --count $(COUNT)

.PHONY: demo-down
demo-down: ## Remove everything the demo made
	@[ ! -x $(BIN)/python ] || $(BIN)/python -m ppec_lab.demo down

.PHONY: test
test: setup ## All tests: units, properties, both databases, real libvirt, an end-to-end run on container hosts
	@# A file's tests stay in one process, which so starts its fixtures (hosts, databases) once.
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not metal" $(PYTEST_ARGS)

.PHONY: test-long
test-long: setup ## The tests that `make test` leaves out: roles step by step on a host, a VM of the Debian image, the image and its guest agent, 50,000 mutated frames (some 20 minutes)
	@$(BIN)/pytest -m long $(PYTEST_ARGS)

.PHONY: metal
metal: setup ## KVM, pins, huge pages, a retune and NVMe drives on an emulated two-socket machine (18 minutes; its disk once 4 more)
	@$(BIN)/python -m ppec_lab.requirements
	$(BIN)/pytest -p no:xdist -s -m metal tests/metal $(PYTEST_ARGS)

.PHONY: check
check: setup ## ruff, mypy strict, import-linter, ansible-lint production
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/ansible-lint --offline

.PHONY: bench
bench: setup ## Figures beside their peers: creating, accepting, planning, lists, NUMA and others (BENCH=name: one of them; BENCH="planning --seed 7 --hosts 80")
	@$(BIN)/python -m bench $(BENCH)

.PHONY: molecule
molecule: setup ## The roles on two systemd hosts: converge, idempotence, verify (about 6 minutes)
	@$(BIN)/molecule test

.PHONY: sanity
sanity: setup ## ansible-test sanity on the collection (about 2 minutes)
	@tests/collection/ansible_test_sanity.sh

.PHONY: clean
clean: ## Remove what was built here (the demo's caches under /var/cache/ppec stay)
	@rm -rf build $(VENV)
