# `make demo` and `make test` set up everything that they need on a Debian machine, as root.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo can-demo test test-here test-faults test-lab-then-faults test-fast faults fuzz soak lab test-lab lint format bench packages \
	test-packages test-install test-fresh test-kubernetes clean

# Each of thousands of processes would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin
GUEST := build/guest/initrd.img
FULL_GUEST := build/guest/full/initrd.img
KIND ?= disk
SECONDS ?= 60
SEED ?= 0
CYCLES ?= 10000
KERNELS ?=
# If set, `make test` runs these, and the lab only on the KERNELS that are named: a Debian that is newer
# than those of the lab has none of them.
TESTS ?=
RELEASE ?= trixie
# If set, of the tests that need neither root nor QEMU `make test` runs what `make test-fast` does.
QUICK ?=
# Thousands of short tests: each costs less without a file for its output and without `caplog`.
# Many failures have one cause: what they print is worth more than the rest of the run.
PYTEST := $(BIN)/pytest --maxfail=10
SPREAD := $(PYTEST) --in-memory --spread --capture=sys -p no:logging
# Of some 11 000 tests beside a busy lab one may lose a race. Two may, and each is shown: a test that
# passes only the second time is a fault to mend.
AGAIN := --reruns 1 --max-suite-reruns 2 --rerun-show-tracebacks
LAB := $(BIN)/python -m lab --timeout 2400
LAB_TESTS := $(PYTEST) $(AGAIN) tests/lab --durations=15 --junitxml
RESULTS := $(CURDIR)/build/lab/results
WANTS_LAB := $(if $(TESTS),$(KERNELS),yes)
# They take a quarter of the time that the tests here do.
FAULTS := tests/system/faults/test_in_qemu.py

help:
	@echo "make demo       boot a guest, plug a disk into it, let it read, take the disk out again"
	@echo "make test       every test (root, QEMU, the lab VM)"
	@echo "make test-fresh make demo and make test on a new, minimal Debian: RELEASE=trixie"
	@echo "make test-fast  the tests that need neither root nor QEMU, without the slow"
	@echo "make fuzz       coverage-guided hostile input for SECONDS=60"
	@echo "make faults     the whole fault matrix as a table: some minutes, as root"
	@echo "make lab        build the lab VM: real kernels, an IOMMU, devices to pass through"
	@echo "make test-lab   the tests that run in it"
	@echo "make test-kubernetes  build Kubernetes, once, and run the tests with it"
	@echo "make soak       attach and detach 10000 times (CYCLES=N), and print what has grown"
	@echo "make lint       ruff and mypy"
	@echo "make bench      measure the speed that docs/performance.md explains; QUICK=1 runs each row once"
	@echo "make clean      remove everything that these have built"

demo: can-demo packages $(BIN)/vmplug $(GUEST) \
		$(if $(filter virtio-9p,$(KIND)),$(FULL_GUEST)) $(if $(filter vfio,$(KIND)),lab)
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh "$(KIND)"

can-demo:
	@examples/demo.sh --check "$(KIND)"

# The lab VM and the tests here hardly slow each other down: each keeps one CPU busy, and they end
# together. The third job is fuzz, which would delay the lab for a minute.
test: test-packages $(BIN)/vmplug $(GUEST) $(FULL_GUEST) $(if $(WANTS_LAB),lab)
	$(MAKE) --no-print-directory --jobs=3 SEED=1 test-lab-then-faults test-here fuzz test-install

test-lab-then-faults: $(if $(WANTS_LAB),test-lab)
	$(MAKE) --no-print-directory test-faults

# Those that need the host's loop devices, mounts and processes cannot be spread as the others are.
# 5 says that none was chosen.
test-here:
	$(SPREAD) $(AGAIN) $(if $(QUICK),--quick) -m "not qemu and not root$(if $(QUICK), and not slow)" $(TESTS) || \
		[ $$? = 5 ]
	$(if $(OTHERS),$(PYTEST) $(AGAIN) --durations=15 -m "qemu or root" $(OTHERS) || [ $$? = 5 ])

# Beside the others, which may look for a loop device while they take one again.
test-faults:
	$(if $(CHOSEN_FAULTS),$(PYTEST) $(AGAIN) --durations=15 $(CHOSEN_FAULTS))

OTHERS = $(if $(TESTS),$(filter-out $(FAULTS),$(TESTS)),--ignore=$(FAULTS))
CHOSEN_FAULTS = $(if $(TESTS),$(filter $(FAULTS),$(TESTS)),$(FAULTS))

# As a user without the source tree installs it.
test-install: test-packages
	tools/try-wheel

test-fresh:
	@tools/test-fresh "$(RELEASE)" $(if $(TESTS),TESTS="$(TESTS)") $(if $(KERNELS),KERNELS="$(KERNELS)") \
		$(if $(QUICK),QUICK="$(QUICK)")

test-fast: $(BIN)/vmplug
	$(SPREAD) -p no:rerunfailures --quick -m "not qemu and not root and not slow"

fuzz: $(BIN)/vmplug
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

faults: test-packages $(BIN)/vmplug $(GUEST)
	$(BIN)/python -m tests.system.faults
	$(BIN)/python -m tests.system.faults --qemu

lab: test-packages $(BIN)/vmplug $(GUEST)
	lab/build.sh $(KERNELS)

# On each kernel; then with an IOMMU that does not remap interrupts.
# Compiled here, as an emulated CPU takes long for it.
test-lab: lab
	$(BIN)/python -m compileall -q src tests lab guest
	for kernel in $(or $(KERNELS),$$(ls build/lab | grep '^[0-9]')); do \
		$(LAB) --kernel $$kernel -- $(LAB_TESTS) $(RESULTS)/lab-$$kernel.xml || exit; \
	done
	$(LAB) --no-remapping -- $(LAB_TESTS) $(RESULTS)/lab-no-remapping.xml

# `make test` runs these tests too when it is built.
test-kubernetes: test-packages $(BIN)/vmplug $(GUEST)
	tools/build-kubernetes
	$(PYTEST) --durations=15 tests/contract/test_kubelet.py tests/kubernetes

soak: test-packages $(BIN)/vmplug $(GUEST)
	$(BIN)/python -m tests.system.soak --cycles $(CYCLES)

lint: $(BIN)/vmplug
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(BIN)/vmplug
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: packages $(BIN)/vmplug $(GUEST)
	$(BIN)/python -m compileall -q src
	QUICK=$(QUICK) $(BIN)/python -m bench

packages:
	@tools/install-packages

test-packages:
	@tools/install-packages test

$(BIN)/vmplug: requirements-dev.lock pyproject.toml
	@tools/make-venv $(PYTHON)

$(GUEST): guest/build.sh guest/init
	guest/build.sh cloud

$(FULL_GUEST): guest/build.sh guest/init
	guest/build.sh full

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis
