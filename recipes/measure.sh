#!/usr/bin/env bash
# The last part of every recipe: the frozen protocol (data/protocol.json) for the base and a tuned model, the table, and
# a page and pictures to look at.
#   bash recipes/measure.sh runs/x/tuned [NAME]   reads that model, writes NAME*.jsonl and NAME.compare.md (runs/x/tuned)
# 14 minutes a model on 2 CPU cores; the base's rows (B) serve all recipes. SMALL=1: 16 prompts, sampled only, 1 minute.
# Models, judges, flags: recipes/variables.sh.
set -e
. recipes/variables.sh
ROWS=${2:-${1:?expected the folder of a tuned model}}
mkdir -p "$(dirname "$B")"
if [ "$SMALL" ]; then
  if [ "$EVAL" = data/prompts_eval.jsonl ]; then  # one prompt a country
    awk 'NR % 4 == 1 && NR < 64' "$EVAL" > "$B.prompts.jsonl"
  else
    head -16 "$EVAL" > "$B.prompts.jsonl"
  fi
  EVAL=$B.prompts.jsonl
fi

measure() {  # MODEL ROWS FLAGS...: samples, facts and verdicts under the name ROWS
  $PY 01_generate.py --prompts "$EVAL" --model "$1" --out "$2.samples.jsonl" $MEASURE "${@:3}"
  twice $PY 02_decompose.py $ASK --in "$2.samples.jsonl" --out "$2.facts.jsonl"
  twice $PY 03_verify.py $ASK $OPEN --corpus "$CORPUS" --in "$2.facts.jsonl" --out "$2.jsonl"
}
measure "$MODEL" "$B"
measure "$1" "$ROWS"
FILES="base=$B.jsonl tuned=$ROWS.jsonl"
if [ -z "$SMALL" ]; then
  measure "$MODEL" "$B-cool" --temperature 0.3
  measure "$MODEL" "$B-greedy" --temperature 0 --n 1
  [ "$COOL" = 0 ] || measure "$1" "$ROWS-cool" --temperature 0.3
  measure "$1" "$ROWS-greedy" --temperature 0 --n 1
  FILES="$FILES base-cool=$B-cool.jsonl base-greedy=$B-greedy.jsonl tuned-greedy=$ROWS-greedy.jsonl"
  [ "$COOL" = 0 ] || FILES="$FILES tuned-cool=$ROWS-cool.jsonl"
fi
$PY 06_eval.py compare $FILES ${EVAL_K:+--k $EVAL_K} --show 10 --out-md "$ROWS.compare.md" --out-json "$ROWS.compare.json" \
    --report "$ROWS.report.html" --pictures "$ROWS.pictures"
