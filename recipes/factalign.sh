#!/usr/bin/env bash
# FactAlign (Huang and Chen 2024, arXiv 2410.01691): label the policy's own responses by F1@K, their sentences by their
# facts; train KTO on the former and fKTO on the latter, together with data about other abilities; sample again from the
# new policy on fresh prompts; three rounds. SMALL=1: 7 minutes on 2 CPU cores, which prove nothing.
# Ablations (Table 3): LOSS=kto (no fKTO), GENERAL= (no general data), ONLY=general LOSS=kto (no factuality data),
# ITERATIONS=1; Table 4: T=0.75 (instead of balancing), SENTENCE_BETA; Figure 3: PRECISION_SHARE. The paper's own values:
#   K=100 T=0.75 T_S=1 LR=5e-7 GENERAL=trl-lib/kto-mix-14k:train SAMPLE="--temperature 0.5 --max-new-tokens 1024"
#   TRAIN="--max-length 2048 --optim adamw8bit" MEASURE="--max-new-tokens 1024" EVAL_K=100 bash recipes/factalign.sh
# Other models, prompts, judges, corpora, flags: recipes/variables.sh. Stopped anywhere, the same command goes on.
set -e
. recipes/variables.sh
ITERATIONS=${ITERATIONS:-3}
GENERAL=${GENERAL-$R/general.jsonl}
TAKE=${SMALL:+6}   # prompts a round, or all
mkdir -p $R
# The countries come in three parts. Your own prompts say which round they are for: jq -c '.part = input_line_number % 3 + 1'.
SMALL= prompts $R/prompts.jsonl
for i in $(seq $ITERATIONS); do wanted part $i; done

# General data: the paper takes UltraFeedback-binarized, its code kto-mix-14k. Here: two own responses to each of 60
# instructions that are not about facts; good is what passes the instruction's check.
if [ "$GENERAL" = $R/general.jsonl ]; then
  $PY 01_generate.py --prompts data/prompts_general_train.jsonl ${SMALL:+--limit 20} --model "$MODEL" --n 2 --out $R/plain.jsonl
  $PY 03_verify.py --method rate --in $R/plain.jsonl --out $R/general.jsonl
fi
# SFT_DATA=<JSONL of prompts and completions, as messages>: a first stage, which the paper gives Gemma-2B alone (Deita).
M=$MODEL IN=
if [ "$SFT_DATA" ]; then
  $PY 05_train.py --loss sft --prefs "$SFT_DATA" --model "$MODEL" ${FULL---full} --lr ${LR:-1e-5} --batch 32 --out $R/sft --seed ${SEED:-0} $TRAIN
  M=$R/sft
fi
for i in $(seq $ITERATIONS); do
  # Fresh prompts each round, answered by the policy of the round before, at the protocol's T 0.8 (paper: LongFact-like
  # prompts with a postamble, T 0.5).
  grep -E "\"part\": ?$i[,}]" "$PROMPTS" | head -n ${TAKE:-999999} > $R/prompts$i.jsonl
  $PY 01_generate.py --prompts $R/prompts$i.jsonl --model "$M" --n $N --seed ${SEED:-$i} --out $R/samples$i.jsonl $SAMPLE
  twice $PY 02_decompose.py $ASK --in $R/samples$i.jsonl --out $R/facts$i.jsonl
  twice $PY 03_verify.py $ASK $OPEN --in $R/facts$i.jsonl --corpus "$CORPUS" --out $R/verified$i.jsonl
  IN="$IN $R/verified$i.jsonl"   # earlier rounds' rows stay
  # t is chosen so that good and bad responses balance (the authors' notebook; paper: 0.75 of F1@100), t_s 0.5 as for
  # their Llama-3 (paper: 1). FLAGS are the weights that balance what is left: without them a 135M model is destroyed.
  FLAGS=$($PY 04_build_prefs.py factalign --in $IN --k ${K:-10} ${T:+--t $T} $([ "$T" ] || echo --balance) \
    --t-s ${T_S:-0.5} --precision-share ${PRECISION_SHARE:-0} ${GENERAL:+--general $GENERAL} \
    ${ONLY:+--only $ONLY} --eval-prompts "$EVAL" --out $R/prefs$i.jsonl)
  # KTO beta 0.1, fKTO beta 0.5, lambda 2 (section 5.1); one epoch; reference: the policy that the round starts from
  # (their script; REF=$MODEL, spelled out: the first model). The paper: 16 rows a step, too; lr 5e-7, 8-bit AdamW.
  $PY 05_train.py --loss ${LOSS:-factalign} $FLAGS --sentence-beta ${SENTENCE_BETA:-0.5} --prefs $R/prefs$i.jsonl \
    --model "$M" --ref ${REF:-start} ${FULL---full} --lr ${LR:-1e-5} --batch 16 --save-every 20 --out $R/round$i --seed ${SEED:-0} $TRAIN
  M=$R/round$i
done
$PY 06_eval.py plot $(for i in $(seq $ITERATIONS); do echo round$i=$R/round$i/log.jsonl; done) --out $R/curves.png
bash recipes/measure.sh $M
