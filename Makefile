# make demo   a real model answers over gRPC and HTTP          make test   the tests (< 20 minutes on two cores)
# make lint   ruff and pyright                                 make bench  a short throughput run of the demo model
# PYTHON=/path/to/python picks the interpreter; otherwise the newest CPython >= 3.11 that runs (tools/venv.sh).

PYTEST_ARGS ?=
BENCH_ARGS ?= latency smollm2-135m --batch-size 8 --output-len 64 --num-iters-warmup 1 --num-iters 5
export PYTHON

.PHONY: demo test test-slow lint format bench clean

demo:
	@tools/venv.sh
	@.venv/bin/python examples/demo.py

test:
	@tools/venv.sh test
	.venv/bin/python -m pytest $(PYTEST_ARGS)

test-slow:
	@tools/venv.sh test
	.venv/bin/python -m pytest -m slow $(PYTEST_ARGS)

lint:
	@tools/venv.sh test dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format:
	@tools/venv.sh dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench:
	@tools/venv.sh
	.venv/bin/jengine bench $(BENCH_ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
