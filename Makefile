# make demo: from nothing to a trained network in minutes. make test: the whole test suite.
# Both set themselves up first, once: system packages (apt, when root), .venv, the versions of constraints.txt.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test set-up clean

set-up: .venv/.ready

.venv/.ready: constraints.txt set_up.sh
	PYTHON=$(PYTHON) ./set_up.sh

demo: .venv/.ready
	rm -rf demo/run
	$(RUN) write_ffcv.py --cfg.dataset=demo --cfg.data_dir=demo/images --cfg.write_path=demo --cfg.num_workers=2
	$(RUN) train_imagenet.py --config-file rsb_configs/demo.yaml

test: .venv/.ready
	$(RUN) -m pytest

clean:
	rm -rf .venv demo build *.egg-info
