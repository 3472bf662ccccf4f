# make demo   all six stages on a real 135M model, small: no key, no hub, no GPU
# make test   the tests
# Both first make .venv from requirements.txt and the embedded world, where missing or older.
PY = .venv/bin/python
D = runs/demo

.venv/ready: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt $(if $(CI),-c .ci/constraints.txt)
	touch $@

world: .venv/ready
	$(PY) data/prepare.py

# Learn from 48 countries, measure on 26 others, in FactTune's order: SFT, here on the best of the
# model's own samples, then DPO on pairs of them. Stopped anywhere, it goes on where it was.
demo: world
	mkdir -p $(D)
	grep -e '-all"' data/prompts_train.jsonl | head -48 > $(D)/train.jsonl
	grep -e '-all"' data/prompts_dev.jsonl > $(D)/dev.jsonl
	$(PY) 01_generate.py --prompts $(D)/train.jsonl --out $(D)/samples.jsonl
	$(PY) 02_decompose.py --in $(D)/samples.jsonl --out $(D)/facts.jsonl
	$(PY) 03_verify.py --in $(D)/facts.jsonl --out $(D)/verified.jsonl
	$(PY) 01_generate.py --prompts $(D)/dev.jsonl --out $(D)/base.samples.jsonl --n 6
	$(PY) 02_decompose.py --in $(D)/base.samples.jsonl --out $(D)/base.facts.jsonl
	$(PY) 03_verify.py --in $(D)/base.facts.jsonl --out $(D)/base.jsonl
	$(PY) 04_build_prefs.py rft --in $(D)/verified.jsonl --out $(D)/best.jsonl --reward f1
	$(PY) 04_build_prefs.py rft --in $(D)/base.jsonl --out $(D)/best_heldout.jsonl --reward f1
	$(PY) 05_train.py --prefs $(D)/best.jsonl --eval-prefs $(D)/best_heldout.jsonl --out $(D)/sft \
	  --loss sft --full --lr 3e-5 --batch 16 --epochs 3
	$(PY) 04_build_prefs.py facttune --in $(D)/verified.jsonl --out $(D)/prefs.jsonl --reward f1 \
	  --margin 0.2
	$(PY) 05_train.py --prefs $(D)/prefs.jsonl --model $(D)/sft --out $(D)/tuned \
	  --loss dpo --full --lr 1e-5 --batch 16 --epochs 2
	$(PY) tests/demo_check.py $(D)/sft/log.jsonl $(D)/tuned/log.jsonl
	$(PY) 01_generate.py --prompts $(D)/dev.jsonl --out $(D)/tuned.samples.jsonl --model $(D)/tuned --n 6
	$(PY) 02_decompose.py --in $(D)/tuned.samples.jsonl --out $(D)/tuned.facts.jsonl
	$(PY) 03_verify.py --in $(D)/tuned.facts.jsonl --out $(D)/tuned.jsonl
	$(PY) 06_eval.py compare base=$(D)/base.jsonl tuned=$(D)/tuned.jsonl --report $(D)/report.html \
	  --pictures $(D)

test: world
	$(PY) -m ruff check --line-length 100 --select E,F,W .
	$(PY) -m pytest -q tests

# 200 runs disturbed at random moments, by kills, full disks, a second process, ... (make test has
# 12); 2,000 damaged files for each reader of each stage (make test: 50)
chaos: world
	NANOFACT_CHAOS=200 $(PY) -m pytest -q tests/test_chaos.py
	NANOFACT_FUZZ=2000 $(PY) -m pytest -q -rP tests/test_fuzz.py

# 05 side by side with TRL, which goes into runs/bench and nowhere else; sampling, calls and search
# beside what they replace; 40 minutes, nothing beside it
bench: world
	$(PY) tests/bench_train.py
	$(PY) tests/bench_stages.py

.PHONY: world demo test chaos bench
