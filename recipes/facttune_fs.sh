#!/usr/bin/env bash
# FactTune-FS (Tian et al. 2023, arXiv 2311.08401) in the embedded world: rank a model's own samples by
# the share of their facts that a reference work supports, then DPO. Not run at full size yet: 2 CPU
# cores would need about 2 hours (480 prompts x 6 samples; sampling 160 tokens/s, training 150).
# Real models: MODEL=<hub name> CORPUS=<JSONL of passages> PROMPTS=<JSONL> bash recipes/facttune_fs.sh
set -e
MODEL=${MODEL:-data/world/model}
CORPUS=${CORPUS:-data/world/countries.jsonl}
PROMPTS=${PROMPTS:-data/prompts_train.jsonl}
EVAL=${EVAL:-data/prompts_eval.jsonl}
PY=${PY:-.venv/bin/python}
R=${R:-runs/facttune_fs}

# Sample. The paper: 10 responses a prompt at T 1.0; here 6 at the protocol's T 0.8.
$PY 01_generate.py --prompts "$PROMPTS" --model "$MODEL" --n 6 --seed 1 --out $R/samples.jsonl
$PY 02_decompose.py --in $R/samples.jsonl --out $R/facts.jsonl
$PY 03_verify.py --in $R/facts.jsonl --corpus "$CORPUS" --out $R/verified.jsonl

# Prefer the best response of a prompt to each that scores lower (the paper's summary; its code: all pairs).
$PY 04_build_prefs.py facttune --in $R/verified.jsonl --eval-prompts "$EVAL" --out $R/prefs.jsonl \
    --eval-out $R/prefs_heldout.jsonl

# Train. The paper: RMSprop, lr 5e-7, 1 epoch, 7B; a 135M model needs a higher rate.
$PY 05_train.py --prefs $R/prefs.jsonl --eval-prefs $R/prefs_heldout.jsonl --model "$MODEL" --out $R/tuned

# Measure under the frozen protocol: sampled, cool, greedy, of the base and of the tuned model.
for who in base tuned; do
  M=$([ $who = base ] && echo "$MODEL" || echo $R/tuned)
  $PY 01_generate.py --prompts "$EVAL" --model "$M" --out $R/$who.samples.jsonl
  $PY 01_generate.py --prompts "$EVAL" --model "$M" --out $R/$who-cool.samples.jsonl --temperature 0.3
  $PY 01_generate.py --prompts "$EVAL" --model "$M" --out $R/$who-greedy.samples.jsonl --temperature 0 --n 1
  for how in "" -cool -greedy; do
    $PY 02_decompose.py --in $R/$who$how.samples.jsonl --out $R/$who$how.facts.jsonl
    $PY 03_verify.py --in $R/$who$how.facts.jsonl --corpus "$CORPUS" --out $R/$who$how.jsonl
  done
done
$PY 06_eval.py compare base=$R/base.jsonl base-cool=$R/base-cool.jsonl base-greedy=$R/base-greedy.jsonl \
    tuned=$R/tuned.jsonl tuned-cool=$R/tuned-cool.jsonl tuned-greedy=$R/tuned-greedy.jsonl
