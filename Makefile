# Every target does its own set-up: `make run` and `make test` work in a bare clone.

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/installed.stamp
DEMO_RUN := state/demo-model
SOURCES := $(wildcard common services compose chaos tests)
LOCAL_TESTS := not docker and not slow and not gpu and not load

# A person's activated environment or module path must not leak into this one.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV CONDA_PREFIX PIP_TARGET PIP_PREFIX PIP_USER
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := help
.PHONY: help setup run test slow-test lint type fmt bench bench-peers bench-agents bench-cache bench-growth bench-safety bench-parallel bench-collectives bench-hops bench-gaps bench-hosts bench-drafts bench-pipelines bench-long-prompt bench-stalls bench-parity bench-turns bench-router bench-memory bench-sessions bench-bits bench-builds source-counts load-test gpu-test chaos chaos-compose chaos-weights demo-model demo-eval lock clean

help:
	@echo 'make run           start a mesh on this machine and serve until Ctrl-C'
	@echo 'make test          unit, architecture and integration tests that need no Docker'
	@echo 'make slow-test     what takes minutes: more faults, builds with planted bugs that the harness must find'
	@echo 'make lint type fmt ruff, mypy --strict, ruff format'
	@echo 'make bench         TTFT, TPOT and tokens/s through HTTP, beside transformers on the same weights'
	@echo 'make bench-peers   the mesh beside llama.cpp, vLLM, OpenVINO and transformers (BENCH_ARGS="--quick")'
	@echo 'make bench-agents  conversations that begin alike, on the mesh, llama.cpp and vLLM (BENCH_ARGS="--quick")'
	@echo 'make bench-cache   what the prefix cache brings with a hit, and costs without one, in pairs'
	@echo 'make bench-growth  how times grow with streams, context, experts and stages (BENCH_ARGS="--quick")'
	@echo 'make bench-safety  what the journal, mirrors and exact sums cost'
	@echo 'make bench-parallel layers in a row and ranks side by side: TTFT, TPOT and tokens/s of each shape'
	@echo 'make bench-collectives what ranks pay for one exchange, beside Gloo alone'
	@echo 'make bench-hops    an expert call, beside a bare round trip of the same bytes'
	@echo 'make bench-gaps    what stands between the kernels of a layer, with one stream'
	@echo 'make bench-hosts   two hosts, played by namespaces, beside one on the same cores (needs root)'
	@echo 'make bench-drafts  drafts that are right at a known rate, and prompt lookup, beside no drafts'
	@echo 'make bench-pipelines two pipelines beside one, a pinned core and one request in flight each'
	@echo 'make bench-long-prompt a prompt of 10,240 tokens beside what its products alone take'
	@echo 'make bench-stalls  how long streams stand still at each kind of loss'
	@echo 'make bench-parity  every comparison with transformers, the long ones too'
	@echo 'make bench-turns   the longest turns of the mesh thread of a large mesh'
	@echo 'make bench-router  CPU time of the router a token, with 256 streams of a mesh that computes nothing'
	@echo 'make bench-memory  memory of each process of a mesh, and what the model needs of it'
	@echo 'make bench-sessions a conversation that had to make room for others, beside a cold one'
	@echo 'make bench-bits    hashes of the answers of this build, or whether another one has the same (BENCH_ARGS)'
	@echo 'make bench-builds  this build beside another one, in pairs: speed, CPU time (BENCH_ARGS="--before ../before")'
	@echo 'make source-counts files, lines, classes and functions of the source, also beside another checkout'
	@echo 'make load-test     1,000 requests, clients that vanish, memory over time'
	@echo 'make gpu-test      what only a GPU can show; needs one, and a CUDA build of torch'
	@echo 'make chaos         20 faults on a mesh of this machine under load: was anything lost? (CHAOS_ARGS="--seed 2")'
	@echo 'make chaos-compose the same on containers, which are started for it and removed'
	@echo 'make chaos-weights the same on random weights of both model families'
	@echo 'make demo-model    train the demo model anew (an hour on two cores; goes on where it stopped)'
	@echo 'make demo-eval     held-out questions to the demo model through a mesh, accuracy by task'
	@echo 'make lock          resolve the ranges of pyproject.toml anew into requirements.lock'
	@echo 'make clean         remove the environment and all caches'

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock compose/setup-venv.sh
	@sh compose/setup-venv.sh $(VENV)

# The sentence that says why a mesh cannot start is the last line that people read: make ends with it, by a signal that it
# says nothing about, rather than add "make: *** Error 1". Its status is not 0 all the same.
run: $(STAMP)
	@$(VENV)/bin/moemesh up || { status=$$?; kill -PIPE $$PPID; exit $$status; }

test: $(STAMP)
	$(VENV_PYTHON) -m pytest -m "$(LOCAL_TESTS)" $(PYTEST_ARGS)

slow-test: $(STAMP)
	$(VENV_PYTHON) -m pytest -m "slow and not docker and not gpu and not load" $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

type: $(STAMP)
	$(VENV_PYTHON) -m mypy $(SOURCES)

fmt: $(STAMP)
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .

bench: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks $(BENCH_ARGS)

bench-peers: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.peers $(BENCH_ARGS)

bench-agents: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.agents $(BENCH_ARGS)

bench-cache: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.prefix_cache $(BENCH_ARGS)

bench-growth: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.growth $(BENCH_ARGS)

bench-safety: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.safety_cost $(BENCH_ARGS)

bench-parallel: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.parallel $(BENCH_ARGS)

bench-collectives: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.collectives $(BENCH_ARGS)

bench-hops: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.expert_hop $(BENCH_ARGS)

bench-gaps: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.kernel_gaps $(BENCH_ARGS)

bench-hosts: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.hosts $(BENCH_ARGS)

bench-drafts: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.drafts $(BENCH_ARGS)

# Parts of bench-growth, whose report they leave as it is.
bench-pipelines: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.growth --parts pair --output-dir state/pipelines $(BENCH_ARGS)

bench-long-prompt: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.growth --parts long-prompt --output-dir state/long-prompt $(BENCH_ARGS)

bench-stalls: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.stalls $(BENCH_ARGS)

bench-turns: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.mesh_turn $(BENCH_ARGS)

bench-router: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.router_cost $(BENCH_ARGS)

bench-memory: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.memory $(BENCH_ARGS)

bench-sessions: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.sessions $(BENCH_ARGS)

bench-bits: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.same_bits $(BENCH_ARGS)

bench-builds: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.two_builds $(BENCH_ARGS)

source-counts: $(STAMP)
	$(VENV_PYTHON) -m tests.benchmarks.source_counts $(BENCH_ARGS)

bench-parity: $(STAMP)
	$(VENV_PYTHON) -m pytest -m parity $(PYTEST_ARGS)

load-test: $(STAMP)
	$(VENV_PYTHON) -m pytest -m load $(PYTEST_ARGS)

gpu-test: $(STAMP)
	$(VENV_PYTHON) -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

chaos: $(STAMP)
	$(VENV)/bin/moemesh chaos run $(CHAOS_ARGS)

chaos-compose: $(STAMP)
	@sh compose/chaos-compose.sh $(CHAOS_ARGS)

# Random weights of both families: the smoke suite's rules hold whatever a model says.
chaos-weights: $(STAMP)
	set -e; for family in qwen3_moe mixtral; do \
	    $(VENV_PYTHON) -m compose.tiny_checkpoint state/random/$$family --family $$family; \
	    MODEL=state/random/$$family $(VENV)/bin/moemesh chaos run --output chaos-report/$$family $(CHAOS_ARGS); \
	done

demo-model: $(STAMP)
	$(VENV_PYTHON) -m compose.demo.train $(DEMO_RUN) $(DEMO_ARGS)
	$(VENV_PYTHON) -m compose.demo.export $(DEMO_RUN) compose/demo/checkpoint
	$(VENV_PYTHON) -m compose.demo.routing_report $(DEMO_RUN) --image $(DEMO_RUN)/experts.png

demo-eval: $(STAMP)
	$(VENV_PYTHON) -m compose.demo.evaluate $(DEMO_EVAL_ARGS)

lock:
	@sh compose/write-lock.sh

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
