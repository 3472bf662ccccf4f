#!/usr/bin/env bash
# Rejection-sampling fine-tuning (RAFT, Dong et al. 2023, arXiv 2304.06767): SFT on the best of a model's own
# samples for each prompt. No paper of the four; the cheapest thing that they have to beat.
# It takes facttune_fs.sh's samples and verdicts (and makes them, with the same commands, if they are missing).
set -e
MODEL=${MODEL:-data/world/model}
CORPUS=${CORPUS:-data/world/countries.jsonl}
EVAL=${EVAL:-data/prompts_eval.jsonl}
PY=${PY:-.venv/bin/python}
R=${R:-runs/rft}
B=${B:-runs/base}          # the untuned model's rows, shared by all recipes
S=${S:-runs/facttune_fs}   # prompts, samples and verdicts, shared with facttune_fs.sh
mkdir -p $R $S

# 10 minutes, as in facttune_fs.sh: 240 prompts x 6 samples.
[ "$PROMPTS" ] || awk 'int((NR - 1) / 4) % 2 == (NR - 1) % 2' data/prompts_train.jsonl > $S/prompts.jsonl
PROMPTS=${PROMPTS:-$S/prompts.jsonl}
$PY 01_generate.py --prompts "$PROMPTS" --model "$MODEL" --n 6 --seed 1 --out $S/samples.jsonl
$PY 02_decompose.py --in $S/samples.jsonl --out $S/facts.jsonl
$PY 03_verify.py --in $S/facts.jsonl --corpus "$CORPUS" --out $S/verified.jsonl

# The best of each prompt, by the reward of facttune_fs.sh; prompts whose samples all score alike are left out.
$PY 04_build_prefs.py rft --in $S/verified.jsonl --reward f1 --k 10 --eval-prompts "$EVAL" \
    --out $R/sft.jsonl --eval-out $R/sft_heldout.jsonl
$PY 05_train.py --prefs $R/sft.jsonl --eval-prefs $R/sft_heldout.jsonl --model "$MODEL" --full --loss sft --lr 3e-5 \
    --epochs 3 --out $R/tuned
$PY 06_eval.py plot rft=$R/tuned/log.jsonl --out $R/curves.png

# The frozen protocol: sampled, cool, greedy. 14 minutes a model; facttune_fs.sh's rows of the base serve here too.
for who in $B/base $R/tuned; do
  M=$([ $who = $B/base ] && echo "$MODEL" || echo $R/tuned)
  $PY 01_generate.py --prompts "$EVAL" --model "$M" --out $who.samples.jsonl
  $PY 01_generate.py --prompts "$EVAL" --model "$M" --out $who-cool.samples.jsonl --temperature 0.3
  $PY 01_generate.py --prompts "$EVAL" --model "$M" --out $who-greedy.samples.jsonl --temperature 0 --n 1
  for rows in $who $who-cool $who-greedy; do
    $PY 02_decompose.py --in $rows.samples.jsonl --out $rows.facts.jsonl
    $PY 03_verify.py --in $rows.facts.jsonl --corpus "$CORPUS" --out $rows.jsonl
  done
done
$PY 06_eval.py compare base=$B/base.jsonl base-cool=$B/base-cool.jsonl base-greedy=$B/base-greedy.jsonl \
    tuned=$R/tuned.jsonl tuned-cool=$R/tuned-cool.jsonl tuned-greedy=$R/tuned-greedy.jsonl \
    --show 10 --out-md $R/compare.md --out-json $R/compare.json
