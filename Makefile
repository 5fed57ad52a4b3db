# `make look` and `make test` set up what they need in .venv, and do their job.
PYTHON ?= python3
VENV ?= .venv
PIP := PIP_CONSTRAINT=constraints.txt $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: look test fuzz oldest conformance mutants lint docs bench zoo sanitize arm clean

look: $(VENV)/installed
	$(VENV)/bin/regard look

# A process for each core, with one thread each; who has nothing left takes from the other
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal

# Models run in drawn ways under drawn sessions, against their own maps: make fuzz MINUTES=60 SEED=1
fuzz: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz --minutes $(or $(MINUTES),2) --seed $(or $(SEED),0)

# Every architecture in transformers' registry: ten minutes on two cores
conformance: $(VENV)/installed-test
	$(VENV)/bin/python -m tests.conformance --quiet --docs docs/architectures.md

# The oldest transformers that pyproject.toml allows; the newest is in constraints.txt
OLDEST := $(VENV)-oldest
OLDEST_PIP := PIP_CONSTRAINT=$(OLDEST)/constraints.txt $(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet
oldest:
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -Ev '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(OLDEST)/constraints.txt
	@echo 'transformers==5.10.*' >> $(OLDEST)/constraints.txt
	@$(OLDEST_PIP) install --upgrade pip
	@$(OLDEST_PIP) install torch
	@$(OLDEST_PIP) install --group test --editable .
	$(OLDEST)/bin/python -m pytest tests/core/test_exact.py tests/core/test_seam.py tests/core/test_any_model.py tests/core/test_recording.py

# Small changes of methods that no test sees: make mutants [KEYS="moba act"] [ROOM=circuits]; some minutes a paper
mutants: $(VENV)/installed-test
	$(VENV)/bin/python -m tests.mutants $(KEYS) $(if $(ROOM),--room $(ROOM))

lint: $(VENV)/installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Ratios to what others do in the same run; writes docs/benchmarks.md. About 20 minutes, and nothing else should run.
bench: $(VENV)/installed-bench
	$(VENV)/bin/python bench/attention.py --write

# The kernel's tests under the address and undefined-behaviour sanitizers
sanitize: $(VENV)/installed-test
	cmake -S src/regard/kernels/native -B build/sanitize -DREGARD_SANITIZE=ON >/dev/null
	cmake --build build/sanitize
	REGARD_NATIVE=$(CURDIR)/build/sanitize/_native.so LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 $(VENV)/bin/python -m pytest -s tests/kernels/test_native.py

# The kernel's tests as an ARM machine runs them, under emulation: on Debian, with qemu-user and a cross compiler; half
# an hour
arm: $(VENV)/installed-test
	VENV=$(VENV) tests/arm.sh

# Retrain the models that ship with the package, and compare their abilities with the cards: some hours on two cores.
# make zoo DATA=folder [MODELS="viewer describer"]
zoo: $(VENV)/installed-test
	$(VENV)/bin/python -m regard.zoo train $(MODELS) --out build/zoo $(if $(DATA),--data $(DATA))
	$(VENV)/bin/python -m regard.zoo check $(MODELS) --out build/zoo

NATIVE := $(wildcard src/regard/kernels/native/*.cpp src/regard/kernels/native/*.h) src/regard/kernels/native/CMakeLists.txt

$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	@echo "setting up $(VENV)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@# torch first: what asks for it later takes the build that is there
	@$(PIP) install torch
	@$(PIP) install --editable .
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	@$(PIP) install --group $*
	@touch $@

clean:
	rm -rf $(VENV) build dist site
