# `make help` lists the targets. All but `help`, `lock` and `clean` first set up .venv, once.
.DEFAULT_GOAL := help
.PHONY: help setup demo compare test chaos bench lint lock clean
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCHMARKS := noise update swap scoring rollouts generation scaling gradient trl_curves soak

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

setup: $(INSTALLED)  ## make .venv with every package pinned (CPU)

$(INSTALLED): requirements/cpu.txt requirements/torch.txt pyproject.toml scripts/setup.sh
	scripts/setup.sh

demo: $(INSTALLED)  ## train SmolLM2-135M on Countdown into a new folder under runs/
	$(BIN)/es-engine train configs/countdown_smollm2.yaml --run-dir runs/demo-$$(date +%Y%m%d-%H%M%S)

compare: $(INSTALLED)  ## compare ES, GRPO and SFT on the tiny model: five minutes; begun again, it goes on
	$(BIN)/es-engine compare configs/comparisons/tiny.yaml --dir runs/compare_tiny

test: lint  ## lint, then every test
	scripts/chromium.sh
	$(BIN)/pytest -m "not vllm and not chaos" --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m "vllm and not chaos" --numprocesses 2 --dist loadfile --no-loadscope-reorder

chaos: $(INSTALLED)  ## every fault on a real cluster, with what was counted in runs/chaos.jsonl
	mkdir -p runs && rm -f runs/chaos.jsonl
	CHAOS_TABLE=runs/chaos.jsonl $(BIN)/pytest tests/test_chaos.py tests/test_chaos_driver.py tests/test_chaos_ray.py

bench: $(INSTALLED)  ## the short form of every benchmark, with figures and plots under runs/bench
	for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$name.py --short --json runs/bench/$$name.json --plot runs/bench/$$name.png || exit 1; \
	done

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lock:  ## write the pins in requirements/ anew from pyproject.toml
	python3 scripts/lock.py

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find es_engine workers rewards tests scripts -name __pycache__ -prune -exec rm -rf {} +
