# make demo: from nothing to a trained network in minutes. make check: formatters, linter and type
# checker. make test: the test suite, in minutes. make test-all: all of it at full length (hundreds
# of kills, 100,000 damaged inputs), with its log in records/. make wheel: an sdist and a wheel, in
# dist/.
# Each target runs the set-up first if needed: system packages (apt, as root), .venv, the versions
# in constraints.txt.
# PYTHON: the interpreter for .venv (default: python3 if its version is supported, else the newest
# supported interpreter)
PYTHON ?=
RUN = .venv/bin/python
CORE = rsb_ffcv/ops/_native.abi3.so
C_FILES = $(foreach folder,rsb_ffcv/ops/csrc rsb_ffcv/ops/csrc/shared benchmarks tests/fuzz,$(wildcard $(folder)/*.[ch]))

.PHONY: demo check test test-all docs gpu-check gpu-bundle reproduce wheel set-up clean

set-up: $(CORE)

.venv/.ready: constraints.txt set_up.sh
	PYTHON="$(PYTHON)" ./set_up.sh

$(CORE): .venv/.ready setup.py $(wildcard rsb_ffcv/ops/csrc/* rsb_ffcv/ops/csrc/shared/*)
	$(RUN) setup.py -q build_ext --inplace --force
	touch $(CORE)

demo: set-up
	rm -rf demo/run
	$(RUN) write_ffcv.py --cfg.dataset=demo --cfg.data_dir=demo/images --cfg.write_path=demo \
	    --cfg.num_workers=2
	$(RUN) train_imagenet.py --config-file rsb_configs/demo.yaml

check: set-up
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	.venv/bin/clang-format --dry-run --Werror $(C_FILES)
	$(RUN) -m mypy

test: set-up
	$(RUN) -m pytest

test-all: set-up
	$(RUN) tests/record.py

docs: set-up
	$(RUN) -m rsb_ffcv.commands.options_page > docs/options.md

gpu-check: set-up
	$(RUN) benchmarks/gpu_check.py --out records/$$(date +%F)_gpu $(if $(TRAIN),--train $(TRAIN))

RECIPE ?= paper_a3_100
PROCESSES ?= 1
reproduce: set-up
	$(RUN) benchmarks/reproduce.py --recipe $(RECIPE) --processes $(PROCESSES) \
	    --out records/$$(date +%F)_$(RECIPE) $(OPTIONS)

gpu-bundle: set-up
	$(RUN) benchmarks/gpu_bundle.py --out gpu_bundle.tar.xz

# The wheel is built from the sdist, which therefore is complete. rsb_ffcv.egg-info would add the
# files of an earlier build.
wheel: .venv/.ready
	rm -rf dist rsb_ffcv.egg-info
	$(RUN) -m build --no-isolation --outdir dist/built
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) -m auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	rm -r dist/built

clean:
	rm -rf .venv demo build dist *.egg-info $(CORE)
