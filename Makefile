# Every target sets itself up: it makes .venv from the lock files on first use, and only then.
#
#   make demo                           example data in, derivatives out, under .demo/
#   make run BIDS=in OUT=out ARGS='…'   babyseg on your own dataset
#   make test                           the whole test suite
#   make evaluate DATA=in MAPS=maps     the figures of the model card (see docs/training.md)
#   make lint | format | docs | quickstart | lock | clean | clean-all
#   make wheel | sdist | sbom | audit   what a release consists of, in dist/
#
# Variables: PYTHON=python3.11  TORCH=cpu|cuda  VENV=.venv  DEMO=.demo  WORKERS=2  LEVEL=participant  SAMPLES=67

PYTHON ?= python3
VENV ?= .venv
DEMO ?= .demo
WORKERS ?= 2
LEVEL ?= participant
PIP_AUDIT ?= 2.10.1
SAMPLES ?= 67

bin := $(VENV)/bin
stamps := $(VENV)/.stamps
# What was installed last stays in use until another flavour is asked for.
TORCH ?= $(or $(patsubst run-%,%,$(notdir $(wildcard $(stamps)/run-*))),cpu)
installed := $(stamps)/run-$(TORCH)
installed_test := $(stamps)/test
installed_docs := $(stamps)/docs
torch_pin := $(patsubst torch==%,%,$(shell grep '^torch==' requirements/lock.txt))

# The modules that know nothing of Nipype and torch; types are checked there.
typed := $(addprefix babyseg_bids/,$(addsuffix .py, \
    development errors files labels longitudinal messages morphometry records resources \
    settings shares slurm surfaces tables thinning wrapper)) \
    $(wildcard $(addprefix babyseg_bids/, age*.py discovery*.py preflight*.py qc*.py))
sources := babyseg_bids workflows synthesis tests benchmarks

.PHONY: help demo run test evaluate lint format docs quickstart lock wheel sdist sbom audit clean \
    clean-all install
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@awk '!/^#/ {exit} {sub(/^# ?/, ""); print}' Makefile

install: $(installed)

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo 'babyseg needs Python 3.11, 3.12 or 3.13: make … PYTHON=python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp a flavour of torch: asking for the other one installs it over the first.
$(installed): requirements/lock.txt requirements/install.sh setup.cfg | $(bin)/python
	requirements/install.sh $(bin)/python $(TORCH) requirements/lock.txt
	$(bin)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@mkdir -p $(stamps) && rm -f $(stamps)/run-* && touch $@

$(installed_test): requirements/lock-test.txt | $(installed)
	$(bin)/python -m pip install --quiet --no-deps --requirement $<
	@touch $@

$(installed_docs): requirements/lock-docs.txt | $(installed)
	$(bin)/python -m pip install --quiet --no-deps --requirement $<
	@touch $@

$(DEMO)/.written: $(installed)
	@rm -rf $(DEMO)/bids
	$(bin)/babyseg-example $(DEMO)/bids
	@touch $@

demo: $(DEMO)/.written
	$(bin)/babyseg $(DEMO)/bids $(DEMO)/out participant $(ARGS)
	$(bin)/babyseg $(DEMO)/bids $(DEMO)/out group
	@echo
	@echo 'Example data:  $(DEMO)/bids'
	@echo 'Reports:       $(DEMO)/out/sub-*.html and $(DEMO)/out/group.html'
	@echo 'Label maps:    $(DEMO)/out/sub-*/ses-*/anat/*_desc-aseg_dseg.nii.gz'
	@echo 'Volumes:       $(DEMO)/out/group_desc-babyseg_morph.tsv'

run: $(installed)
	@test -n '$(BIDS)' -a -n '$(OUT)' || \
	    { echo "Say where the data is and where results go: make run BIDS=in OUT=out" >&2; exit 2; }
	$(bin)/babyseg '$(BIDS)' '$(OUT)' $(LEVEL) $(ARGS)

test: $(installed) $(installed_test)
	$(bin)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

evaluate: $(installed)
	@test -n '$(DATA)' -a -n '$(MAPS)' || \
	    { echo "Say where scans and prepared maps are: make evaluate DATA=in MAPS=maps.npz" >&2; exit 2; }
	$(bin)/babyseg-train evaluate '$(MAPS)' --samples $(SAMPLES) --seed 1000
	$(bin)/babyseg-train evaluate '$(MAPS)' --samples $(SAMPLES) --seed 1000 --scans 3
	$(bin)/babyseg-train evaluate '$(MAPS)' --samples $(SAMPLES) --seed 1000 --settings hard
	$(bin)/babyseg-train calibrate '$(MAPS)' --samples 4 --seed 2000
	$(bin)/python benchmarks/real.py '$(DATA)'

lint: $(installed) $(installed_test)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy $(typed)
	$(bin)/codespell $(sources) docs requirements .ci *.md *.cfg *.toml Makefile Dockerfile

format: $(installed) $(installed_test)
	$(bin)/ruff check --fix-only .
	$(bin)/ruff format .

docs: $(installed_docs)
	$(bin)/mkdocs build --strict --quiet
	@echo 'Documentation: site/index.html'

# The commands of the page, as they are copied, in an empty folder.
quickstart: $(installed)
	rm -rf $(DEMO)/quickstart && mkdir -p $(DEMO)/quickstart
	sed -n '/^```sh$$/,/^```$$/{/^```/!p}' docs/quickstart.md > $(DEMO)/quickstart.sh
	cd $(DEMO)/quickstart && PATH='$(abspath $(bin))':"$$PATH" sh -eux ../quickstart.sh
	test -s $(DEMO)/quickstart/results/group.html

# A build folder that was left behind would put deleted modules into the wheel.
wheel: $(installed)
	rm -rf build
	$(bin)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

sdist: $(installed)
	@mkdir -p dist
	$(bin)/python -c "import setuptools.build_meta as b; b.build_sdist('dist')" >/dev/null
	@ls dist/*.tar.gz

sbom: $(installed)
	@mkdir -p dist
	$(bin)/python requirements/sbom.py requirements/lock.txt > dist/babyseg.cdx.json
	@echo 'Bill of materials: dist/babyseg.cdx.json'

# Asks a service on the internet about known weaknesses of what the lock files pin. Strict: a
# package that the service does not know would otherwise count as a sound one. So it also fails
# where the service cannot be reached, and at the first package.
audit:
	test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && \
	    $(VENV)/audit/bin/python -m pip install --quiet pip-audit==$(PIP_AUDIT); }
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off \
	    $(addprefix --requirement ,$(wildcard requirements/lock*.txt)) || { \
	    echo 'A table above lists weaknesses. "could not be audited" instead means that the' \
	    'service gave no answer: nothing is known, ask again with internet.' >&2; exit 1; }

lock:
	requirements/relock.sh $(PYTHON) $(torch_pin)

clean:
	rm -rf $(DEMO) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(sources) -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean
	rm -rf $(VENV)
