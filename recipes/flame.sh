#!/usr/bin/env bash
# FLAME (Lin et al. 2024, arXiv 2405.01525): instruction tuning without new untruths. SFT: of instructions that ask for
# facts the targets are the model's own answers, of the others a person's. DPO: pairs by how well an instruction is
# followed, and of fact-based ones also pairs by how true the answers are. SMALL=1: 5 minutes on 2 CPU cores, no proof.
# Ablations: SFT=0 (DPO from MODEL), TARGETS=given (SFT on people's answers alone), ONLY=if or fact (pairs of one kind).
# Other models, prompts, judges, corpora, flags: recipes/variables.sh. Stopped anywhere, the same command goes on.
set -e
N=${N:-$([ "$SMALL" ] && echo 4 || echo 10)}   # own answers for SFT
. recipes/variables.sh
DEMOS=${DEMOS:-${GIVEN:-data/demonstrations.jsonl}}
mkdir -p $R
prompts $R/prompts.jsonl   # fact-based; and 60 other instructions:
wanted fact_based true
MORE=${MORE-data/prompts_general_train.jsonl}
# SFT (section 4.2). The paper elicits 10 answers a fact-based instruction from the pretrained model, after the five
# most similar demonstrations (T 0.7, top-p 0.9). Here that model is an instruct model: there is no other.
if [ "$GIVEN" ]; then
  twice $PY 01_generate.py --classify --prompts "$GIVEN" --model "${JUDGE:-$MODEL}" ${JUDGE:+--base-url $BASE_URL} \
      --out $R/given.jsonl
  grep '"fact_based": true' $R/given.jsonl > $R/asking.jsonl
else
  sed 's/"example":/"response":/' data/prompts_general_train.jsonl > $R/given.jsonl
  cp "$PROMPTS" $R/asking.jsonl
fi
if [ "$SFT" != 0 ]; then
  $PY 01_generate.py --prompts $R/asking.jsonl --few-shot "$DEMOS" --model "$MODEL" --n $N --seed ${SEED:-1} \
      --temperature 0.7 --top-p 0.9 --out $R/elicited.jsonl $SAMPLE
  $PY 02_decompose.py --in $R/elicited.jsonl --out $R/sentences.jsonl
  $PY 04_build_prefs.py flame-sft --in $R/sentences.jsonl --given $R/given.jsonl --targets ${TARGETS:-own} \
      --eval-prompts "$EVAL" --out $R/sft.jsonl
  $PY 05_train.py --loss sft --prefs $R/sft.jsonl --model "$MODEL" ${FULL---full} --lr ${LR:-1e-5} --batch 32 --out $R/sft --seed ${SEED:-0} $TRAIN
fi
START=$([ "$SFT" = 0 ] && echo "$MODEL" || echo $R/sft)

# DPO (section 4.3). Four answers to every instruction; how well each follows it: a judge's mark, without one a check
# (the paper: the SFT model judges). How true the fact-based ones are: the share of supported facts.
cat "$PROMPTS" $MORE > $R/instructions.jsonl
$PY 01_generate.py --prompts $R/instructions.jsonl --model "$START" --n 4 --seed ${SEED:-2} --temperature 0.7 --top-p 0.9 \
    --out $R/samples.jsonl ${SMALL:+--limit 32} $SAMPLE
twice $PY 02_decompose.py $ASK --in $R/samples.jsonl --out $R/facts.jsonl
THREE='(?s)\A(?:[^.!?]|[.!?](?!\s|\Z))+[.!?](?:\s+(?:[^.!?]|[.!?](?!\s|\Z))+[.!?]){2}\Z'   # "In three sentences, ..."
twice $PY 03_verify.py --method rate ${RATE:---check "$THREE"} --in $R/facts.jsonl --out $R/rated.jsonl
grep '"fact_based": true' $R/rated.jsonl > $R/fact_rated.jsonl
twice $PY 03_verify.py $ASK $OPEN --in $R/fact_rated.jsonl --corpus "$CORPUS" --out $R/verified.jsonl
{ cat $R/verified.jsonl; grep -v '"fact_based": true' $R/rated.jsonl || true; } > $R/both.jsonl
$PY 04_build_prefs.py flame --in $R/both.jsonl ${ONLY:+--only $ONLY} --eval-prompts "$EVAL" --out $R/prefs.jsonl
# A step takes as many pairs of either kind (the paper's uniform sampling; beta 0.1, 64 pairs a step, lr 1e-6 -> 1e-7).
$PY 05_train.py --halves --prefs $R/prefs.jsonl --model "$START" ${FULL---full} --lr ${LR:-1e-5} --batch 32 --epochs ${EPOCHS:-2} \
    --save-every 10 --out $R/tuned --seed ${SEED:-0} $TRAIN
$PY 06_eval.py plot flame=$R/tuned/log.jsonl --out $R/curves.png
bash recipes/measure.sh $R/tuned
