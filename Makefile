# Everything starts here. `make help` lists the commands. Each of them makes .venv when it is missing or stale.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
export MPLBACKEND ?= agg
# Notebooks and tests run two at a time, so each gets one thread; everything else takes what there is.
test test-notebooks test-slow coverage notebooks: export OMP_NUM_THREADS ?= 1

# Which torch: the pinned one, or what `make venv TORCH=… PIP_ARGS=…` asked for last (kept in .venv/choice.mk). See CONTRIBUTING.md.
TORCH_PINS := $(shell grep -E '^torch(vision)?==' constraints.txt)
-include $(VENV)/choice.mk
TORCH    ?= $(TORCH_PINS)
PIP_ARGS ?=
# A torch of another version brings its own versions of a few packages, so those pins go with it.
UNPINNED := $(if $(filter-out $(TORCH_PINS),$(TORCH)),torch|torchvision|triton|sympy|networkx|fsspec|filelock|jinja2|setuptools|typing-extensions,torch|torchvision)

# The stamp holds what .venv was made for. Another folder, torch or pip argument makes it stale, like a change in the files below.
WANTED := $(strip $(CURDIR) $(TORCH) $(PIP_ARGS))
ifneq ($(WANTED),$(strip $(shell cat $(STAMP) 2>/dev/null)))
$(STAMP): FORCE
endif

.DEFAULT_GOAL := help
.PHONY: help venv browser demo test test-notebooks test-slow coverage results lab notebooks docs readme sbom audit clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv with the pinned packages, or bring it up to date

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; this is %d.%d. Say which: make PYTHON=python3.12 …" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@rm -f $(STAMP)
	@$(BIN)/python -c 'import pip, sys; sys.exit(not sys.prefix.startswith("$(CURDIR)/"))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@grep -vE '^($(UNPINNED))==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) $(TORCH) -e '.[dev]' -c $(VENV)/constraints.txt
	@sh tools/git_hooks.sh $(BIN) || echo "Git hooks for notebooks were not installed. Everything else works."
	@printf 'TORCH := %s\nPIP_ARGS := %s\n' '$(TORCH)' '$(PIP_ARGS)' > $(VENV)/choice.mk
	@$(if $(filter-out $(TORCH_PINS),$(TORCH))$(PIP_ARGS),,rm -f $(VENV)/choice.mk)
	@printf '%s\n' '$(WANTED)' > $(STAMP)

browser: $(STAMP)  ## a Chromium for the browser tests, where there is none yet
	@sh tools/browser.sh $(BIN)

demo: $(STAMP)  ## rendered zippers, training, evaluation and report, in a few minutes
	$(BIN)/zipper_ad demo $(ARGS)

test: $(STAMP)  ## everything that must hold: notebooks, tests, style, and generated files in step
	@status=0; $(MAKE) --no-print-directory test-notebooks || status=1; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=5 $(ARGS) || status=1; exit $$status

test-notebooks: $(STAMP)  ## the notebooks alone, each in a process of its own
	$(BIN)/nbdev-test --n-workers 2 --timing

test-slow: $(STAMP)  ## the cells and tests marked slow
	$(BIN)/nbdev-test --n-workers 2 --timing --flags slow --cell-timeout 3600
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: there are none

coverage: $(STAMP)  ## how much of zipper_ad the notebooks and the tests run, together
	$(BIN)/python tools/measure_coverage.py

results: $(STAMP)  ## the measured figures, one file a row under results/; PHOTOGRAPHS=DIR for real ones, ROWS='main-*' for some
	$(BIN)/python tools/results.py jobs=2 $(if $(PHOTOGRAPHS),photographs=$(PHOTOGRAPHS)) $(ROWS)

lab: $(STAMP)  ## JupyterLab on the notebooks, on this machine only
	$(BIN)/jupyter lab --ip=127.0.0.1 --config=tools/jupyter_config.py --notebook-dir=nbs $(ARGS)

notebooks: $(STAMP)  ## run all notebooks and keep their outputs; FLAGS=slow runs slow cells too
	$(BIN)/nbdev-test --n-workers 2 --timing --save --flags '$(FLAGS)' --cell-timeout 3600
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(STAMP)  ## the website, in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs the program Quarto, which pip cannot install. See quarto.org, then run make docs again." >&2; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/docs.py

# The two tools stand in a folder of their own: in .venv they would be on the lists themselves, and change what is pinned.
$(VENV)/security: $(STAMP)
	@rm -rf $@
	$(BIN)/python -m venv $@
	$@/bin/python -m pip install --disable-pip-version-check --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1

sbom: $(VENV)/security  ## sbom.json: every package in .venv, in CycloneDX
	$(VENV)/security/bin/cyclonedx-py environment --output-reproducible -o sbom.json $(BIN)/python

audit: $(VENV)/security  ## known vulnerabilities of the versions in constraints.txt, from a database on the internet
	$(VENV)/security/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

clean:  ## delete .venv and everything generated (not runs/)
	rm -rf $(VENV) sbom.json build dist _proc _docs .pytest_cache .ruff_cache .coverage .coverage.* htmlcov *.egg-info nbs/nbdev.yml nbs/.last_checked
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
