# make demo: from nothing to a trained network in minutes. make test: the whole test suite.
# Both set themselves up first, once: system packages (apt, when root), .venv, the versions of constraints.txt.
PYTHON ?= python3
RUN = .venv/bin/python
CORE = rsb_ffcv/ops/_native.abi3.so

.PHONY: demo test set-up clean

set-up: $(CORE)

.venv/.ready: constraints.txt set_up.sh
	PYTHON=$(PYTHON) ./set_up.sh

$(CORE): .venv/.ready setup.py $(wildcard rsb_ffcv/ops/csrc/*)
	$(RUN) setup.py -q build_ext --inplace --force
	touch $(CORE)

demo: set-up
	rm -rf demo/run
	$(RUN) write_ffcv.py --cfg.dataset=demo --cfg.data_dir=demo/images --cfg.write_path=demo --cfg.num_workers=2
	$(RUN) train_imagenet.py --config-file rsb_configs/demo.yaml

test: set-up
	$(RUN) -m pytest

clean:
	rm -rf .venv demo build *.egg-info $(CORE)
