#!/usr/bin/env bash
# Rejection-sampling fine-tuning (RAFT, Dong et al. 2023, arXiv 2304.06767): SFT on the best of a model's own
# samples for each prompt. No paper of the four; the cheapest thing that they have to beat.
# It takes facttune_fs.sh's samples and verdicts (and makes them, with the same commands, if they are missing).
# Other models, prompts, judges, corpora, flags: recipes/variables.sh. Stopped anywhere, the same command goes on.
set -e
. recipes/variables.sh
mkdir -p $R
prompts $S/prompts.jsonl
$PY 01_generate.py --prompts "$PROMPTS" --model "$MODEL" --n $N --seed ${SEED:-1} --out $S/samples.jsonl $SAMPLE
twice $PY 02_decompose.py $ASK --in $S/samples.jsonl --out $S/facts.jsonl
twice $PY 03_verify.py $ASK $OPEN --in $S/facts.jsonl --corpus "$CORPUS" --out $S/verified.jsonl

# The best of each prompt, by the reward of facttune_fs.sh; prompts whose samples all score alike are left out.
# TARGETS=all: SFT on all samples, which teaches the form alone. TARGETS=reference: on true sentences of the reference work.
RULE="rft --reward ${REWARD:-f1} --k ${K:-10}"
[ "$TARGETS" != all ] || RULE=sft
if [ "$TARGETS" = reference ]; then
  $PY recipes/reference.py --prompts "$PROMPTS" --corpus "$CORPUS" --out $R/reference.jsonl
  RULE="flame-sft --given $R/reference.jsonl --targets given"
fi
$PY 04_build_prefs.py $RULE --in $S/verified.jsonl --eval-prompts "$EVAL" \
    --out $R/sft.jsonl --eval-out $R/sft_heldout.jsonl
$PY 05_train.py --prefs $R/sft.jsonl --eval-prefs $R/sft_heldout.jsonl --model "$MODEL" ${FULL---full} --loss sft \
    --lr ${LR:-3e-5} --epochs ${EPOCHS:-3} --out $R/tuned --seed ${SEED:-0} $TRAIN
$PY 06_eval.py plot rft=$R/tuned/log.jsonl --out $R/curves.png
bash recipes/measure.sh $R/tuned
