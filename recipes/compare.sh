#!/usr/bin/env bash
# Head to head: the four papers, and SFT, KTO and rejection sampling as baselines, on one model, the same prompts, as many
# samples, one verifier, several seeds; measured in and out of the domain. RESULTS.md has the table.
#   bash recipes/compare.sh      the runs that OUT lacks (8 to 62 minutes each on one core), then the tables in OUT/*.json
#   METHODS="rft apeft" SEEDS=4 OUT=runs/mine bash recipes/compare.sh
# A run leaves OUT/<method><seed>.json, its scores, and .jsonl.gz, its rows: any machine can go on with the others. All
# methods learn from N=6 samples to each of 80 prompts (FLAME's DPO from 4); recipes/methods.txt has their settings, and
# those of ablations. Other models, judges, corpora: recipes/variables.sh.
set -e
export PY=${PY:-.venv/bin/python} MODEL=${MODEL:-data/world/model}
D=${D:-runs/compare} OUT=${OUT:-data/results/compare}   # samples and models, too large to keep; what is kept
mkdir -p $D $OUT
# 80 train countries, one prompt each, the four aspects in turn; 50 held-out countries likewise.
[ "$PROMPTS" ] || awk '{i=int((NR-1)/4)} (NR-1)%4==i%4 && i%3!=2' data/prompts_train.jsonl > $D/prompts.jsonl
[ "$EVAL" ] || awk '{i=int((NR-1)/4)} (NR-1)%4==i%4' data/prompts_eval.jsonl > $D/eval.jsonl
awk 'NR % 2' "${PROMPTS:-$D/prompts.jsonl}" > $D/half.jsonl
export PROMPTS=${PROMPTS:-$D/prompts.jsonl} EVAL=${EVAL:-$D/eval.jsonl} B=$D/base COOL=0
METHODS=${METHODS:-sft rft kto facttune_fs facttune_mc flame factalign apeft}
export N=${N:-6} ANSWERS=${ANSWERS:-10} MARGIN=${MARGIN:-0.05}

pack() {  # ROWS NAME: a run's rows in one small file
  $PY recipes/rows.py pack $OUT/$2.jsonl.gz sampled=$1.jsonl greedy=$1-greedy.jsonl ood=$1-ood.jsonl \
      ood_greedy=$1-ood-greedy.jsonl general=$1-general.jsonl premise=$1-qa_false_premise.jsonl \
      unsure=$1-qa_known_unknown.jsonl $([ $2 = base ] && echo cool=$1-cool.jsonl)
}

for seed in ${SEEDS:-1 2 3}; do for name in $METHODS; do (
  read -r _ recipe settings < <(grep "^$name " recipes/methods.txt)
  eval "export SEED=$seed S=$D/samples$seed R=$D/$name$seed $settings"
  [ -e $OUT/$name$seed.json ] && exit
  start=$SECONDS
  bash recipes/$recipe.sh
  echo $((SECONDS - start)) >> $R/seconds   # a run that was stopped adds up
  T=$R/$([ $recipe = factalign ] && echo round${ITERATIONS:-3} || echo tuned)
  bash recipes/wide.sh $T
  [ -e $OUT/base.jsonl.gz ] || pack $B base
  pack $T $name$seed
  printf '{"score": %s, "shift": %s, "seconds": [%s]}\n' "$($PY 06_eval.py score --in $T.jsonl --json)" \
      "$(cat $T.shift.json)" $(paste -sd, $R/seconds) > $OUT/$name$seed.json
); done; done

# The tables of all runs in OUT: 06's own, with all seeds of a method in one row.
$PY recipes/rows.py unpack ${A:=$D/all} $OUT/*.jsonl.gz
sets() { for file in $A/*-$1.jsonl; do echo "$(basename $file -$1.jsonl)$2=$file"; done; }   # NAME=FILE ... of a set
$PY tests/second_verifier.py --in $A/*-sampled.jsonl --out-dir $A
for set in ood sampled.first sampled.second; do $PY 06_eval.py compare $(sets $set) --out-json $OUT/$set.json; done
for set in premise unsure; do $PY 06_eval.py qa $(sets $set) --json > $OUT/$set.json; done
for file in $A/*-general.jsonl; do   # how many pass their check, or have a judge's 5
  echo "\"$(basename $file -general.jsonl)\": [$(grep -c '"rating": 5.0[,}]' $file), $(wc -l < $file)]"
done | paste -sd, | sed 's/.*/{&}/' > $OUT/general.json
$PY 06_eval.py compare $(sets sampled) $(sets cool -cool) $(sets greedy -greedy) --out-json $OUT/sampled.json \
    --out-md $OUT/sampled.md > /dev/null
# The picture: the methods alone, without ablations and their other decodings
FILES=$(for name in $METHODS; do ls $A/$name-sampled.jsonl 2> /dev/null; done | sed 's#.*/\(.*\)-sampled#\1=&#')
$PY 06_eval.py compare base=$A/base-sampled.jsonl base-cool=$A/base-cool.jsonl base-greedy=$A/base-greedy.jsonl $FILES --pictures $A
cp $A/plane.png $OUT
