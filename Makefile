# make quickstart: a trained model and its text, from nothing but Python, pip and make.
# make test: lint and the default tests.  PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
# A prompt that shows whether the model has learnt what Python looks like.
PROMPT ?= def

bin := $(VENV)/bin

.PHONY: quickstart test slow peers browser lint clean

quickstart: $(VENV)/base
	$(bin)/python -m gpt_jax train --config=configs/quickstart.py --workdir=$(RUN)
	@echo; echo "--- held-out text: this model beside general compressors (bits per byte) ---"
	$(bin)/python -m gpt_jax evaluate --run=$(RUN) --tasks=validation,compression
	@echo; echo "--- what it writes ---"
	$(bin)/python -m gpt_jax generate --run=$(RUN) --prompt="$(PROMPT)" --temperature=0.6 --max_tokens=160 --seed=1
	@echo; echo "the run: $(RUN) (loss.png is its loss curve)"

test: lint
	$(bin)/python -m pytest -n auto --dist=loadscope --no-loadscope-reorder

slow: $(VENV)/dev
	$(bin)/python -m pip install -q -e '.[dev,peers]'
	$(bin)/python -m pytest -m slow

# The client of 2023 has the name of today's, so it lies in a folder of its own.
peers: $(VENV)/dev
	$(bin)/python -m pip install -q -e '.[dev,peers]'
	test -d $(VENV)/openai-0.28 || \
		$(bin)/python -m pip install -q --target $(VENV)/openai-0.28 openai==0.28.1
	GPT_JAX_OPENAI_028=$(VENV)/openai-0.28 $(bin)/python -m pytest -m peers -n auto --dist=loadscope --no-loadscope-reorder

# Needs chromium and chromedriver, Debian's packages chromium and chromium-driver.
browser: $(VENV)/dev
	$(bin)/python -m pip install -q -e '.[dev,browser]'
	$(bin)/python -m pytest -m browser

lint: $(VENV)/dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .

$(VENV)/base: requirements.txt pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(bin)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
