# make demo   all stages on a real 135M model: no key, no hub, no GPU
# make test   the tests
# Both first make .venv from requirements.txt and the embedded world, where missing or older.
PY = .venv/bin/python

.venv/ready: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt $(if $(CI),-c .ci/constraints.txt)
	touch $@

world: .venv/ready
	$(PY) data/prepare.py

demo: world
	bash recipes/demo.sh

test: world
	$(PY) -m ruff check --line-length 100 --select E,F,W .
	$(PY) -m pytest -q tests

.PHONY: world demo test
