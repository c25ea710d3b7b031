# `make demo` and `make test` need no set-up: they create the environment, and again only after pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin
# Compiled modules are kept, whatever the environment says: without them each of some hundred processes compiles torch.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-fast test-programs test-nightly test-minimal test-newest test-libraries screens gallery fuzz kill mutate docs release-check lint format clean

demo: $(READY)
	rm -rf build/demo && mkdir -p build/demo
	cd build/demo && ../../$(RUN)/asymswap convert digits-resnet --recipe 3x3-only --evaluate digits

test: $(READY)
	$(RUN)/python -m pytest -n auto --dist worksteal

# Tests that need a program besides Python (chromium, git, mount, g++); skipped if it is not installed.
test-programs: $(READY)
	$(RUN)/python -m pytest -m programs $$(grep -rl --include='*.py' mark.programs tests)

test-fast: $(READY)
	$(RUN)/python -m pytest -n auto --dist worksteal -m "not slow and not nightly"

# What takes hours: every model of torchvision, all hostile files, kills. `make test` takes one of each.
test-nightly: $(READY)
	HYPOTHESIS_PROFILE=nightly $(RUN)/python -m pytest -n auto --dist worksteal -m ""

# Record again what every command shows in a terminal (tests/golden); read the difference before you keep it.
screens: $(READY)
	$(RUN)/python -m pytest tests/cli/test_screens.py -q --record-screens
	git diff --stat -- tests/golden

# The pictures of docs/guide/gallery.md, by the commands on that page. Those of CIFAR-10 need a folder with train and test
# (both with class folders), and a ResNet-20 trained on it: make gallery CIFAR=cifar10/ RESNET20=resnet20.pt
gallery: $(READY)
	$(RUN)/python benchmarks/gallery.py $(if $(CIFAR),--cifar '$(CIFAR)') $(if $(RESNET20),--resnet20 '$(RESNET20)')

# Thousands of damaged and hostile files; killed and disturbed commands. A quarter of an hour each; both write
# docs/results/robustness.md.
fuzz: $(READY)
	$(RUN)/python benchmarks/fuzz.py --again --markdown docs/results/robustness.md

kill: $(READY)
	$(RUN)/python benchmarks/kill.py --again --markdown docs/results/robustness.md

# Mutation testing of the code that decides how a model is converted: hours of one core, writes the last section of
# docs/results/robustness.md. It continues where it was stopped.
mutate: $(READY)
	$(RUN)/python -m pip install --quiet 'mutmut>=3.8'
	$(RUN)/python benchmarks/mutate.py --markdown docs/results/robustness.md

# The site, in site/: first the pages made from code, then everything; a warning is an error.
docs: $(READY)
	$(RUN)/python benchmarks/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

# Build wheel and sdist in build/release/, and run every command of README and tutorial from the wheel.
release-check: $(READY)
	$(RUN)/python .ci/release_check.py

# The oldest and the newest versions that pyproject.toml allows. Old releases raise deprecation warnings together with
# newer releases of their own dependencies, which is not our fault.
test-minimal:
	mkdir -p build && $(PYTHON) .ci/lower_bounds.py > build/lower_bounds.txt
	$(PYTHON) -m venv build/minimal
	build/minimal/bin/python -m pip install --quiet --constraint build/lower_bounds.txt --editable '.[dev,tensorboard]'
	build/minimal/bin/python -m pytest -n auto --dist worksteal -m "not slow and not nightly" \
		-W ignore::DeprecationWarning -W ignore::FutureWarning

# Networks of other libraries, the whole way with the real packages, in an environment of their own; writes
# docs/reference/libraries.md. facenet-pytorch asks for a torch of 2024, and does without.
test-libraries:
	$(PYTHON) -m venv build/libraries
	build/libraries/bin/python -m pip install --quiet --editable '.[dev,transformers,ultralytics]' \
		segmentation-models-pytorch monai spandrel
	build/libraries/bin/python -m pip install --quiet --no-deps facenet-pytorch
	build/libraries/bin/python -m pytest tests/models/test_ultralytics_models.py tests/models/test_transformers_models.py
	build/libraries/bin/python benchmarks/libraries.py --markdown docs/reference/libraries.md

test-newest:
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev,tensorboard]'
	build/newest/bin/python -m pytest -n auto --dist worksteal -m "not slow and not nightly"

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(READY)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) build dist site

$(READY): pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[dev,docs]'
	touch $@
