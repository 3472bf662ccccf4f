#!/usr/bin/env bash
# What a tuned model does where it was not tuned: other topics (elements), other abilities (60 instructions with checks),
# false premises and the unknowable, and how far its first choices are from the base's; 5 minutes on one core.
#   bash recipes/wide.sh runs/x/tuned      after recipes/measure.sh, beside whose files it writes; B: the base's rows
# OOD, OOD_CORPUS: prompts and passages of the other topics. Other models, judges: recipes/variables.sh.
set -e
. recipes/variables.sh
: "${1:?expected the folder of a tuned model}"
OOD=${OOD:-data/prompts_ood.jsonl}
mkdir -p "$(dirname "$B")"
awk 'NR % 2' $OOD > "$B-ood.prompts.jsonl"   # 59 elements, two responses each

EVAL=$B-ood.prompts.jsonl CORPUS=${OOD_CORPUS:-data/world/elements.jsonl} B=$B-ood COOL=0 MEASURE="--n 2" \
    bash recipes/measure.sh "$1" "$1-ood"

others() {  # MODEL ROWS
  for set in general_eval qa_false_premise qa_known_unknown; do
    $PY 01_generate.py --prompts data/prompts_$set.jsonl --model "$1" --temperature 0 --n 1 --out "$2-$set.jsonl"
  done
  twice $PY 03_verify.py --method rate $RATE --in "$2-general_eval.jsonl" --out "$2-general.jsonl"
}
others "$MODEL" "$B"
others "$1" "$1"
$PY 06_eval.py qa base-premise="$B-qa_false_premise.jsonl" tuned-premise="$1-qa_false_premise.jsonl" \
    base-unknown="$B-qa_known_unknown.jsonl" tuned-unknown="$1-qa_known_unknown.jsonl"
$PY 06_eval.py shift id="$1-greedy.jsonl" ood="$1-ood-greedy.jsonl" --model "$1" --base "$MODEL" --json > "$1.shift.json"
