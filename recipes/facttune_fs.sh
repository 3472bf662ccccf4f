#!/usr/bin/env bash
# FactTune-FS (Tian et al. 2023, arXiv 2311.08401): rank a model's own samples by how far a reference work
# supports them, then DPO. In the embedded world, 2 CPU cores: 60 to 75 minutes; F1@5 10.9 -> 24.1 %, precision
# 11.4 -> 24.4 % (RESULTS.md). SMALL=1: 3 minutes, which prove nothing.
# Other models, prompts, judges, corpora, flags: recipes/variables.sh. Stopped anywhere, the same command goes on.
set -e
. recipes/variables.sh
mkdir -p $R
prompts $S/prompts.jsonl

# Sample. The paper: 10 responses a prompt at T 1.0; here 6 at the protocol's T 0.8. 13 minutes.
$PY 01_generate.py --prompts "$PROMPTS" --model "$MODEL" --n $N --seed ${SEED:-1} --out $S/samples.jsonl $SAMPLE
# SFT=1: the paper's first stage, all samples as targets; an instruct model does without on its own samples.
if [ "$SFT" ]; then
  $PY 02_decompose.py --in $S/samples.jsonl --out $R/sentences.jsonl
  $PY 04_build_prefs.py sft --in $R/sentences.jsonl --eval-prompts "$EVAL" --out $R/sft.jsonl
  $PY 05_train.py --loss sft --prefs $R/sft.jsonl --model "$MODEL" ${FULL---full} --lr 1e-5 --out $R/sft --seed ${SEED:-0} $TRAIN
  START=$R/sft
fi
twice $PY 02_decompose.py $ASK --in $S/samples.jsonl --out $S/facts.jsonl
twice $PY 03_verify.py $ASK $OPEN --in $S/facts.jsonl --corpus "$CORPUS" --out $S/verified.jsonl

# The best response of a prompt against each that scores lower (the paper's summary; PAIRS=all: its code).
# The paper's reward is precision; here F1@10: precision alone teaches to say less (RESULTS.md). MARGIN=0.05: only pairs that differ by
# more. LOSS=kto takes each side as a row of its own; FLAGS are the weights with which good and bad ones balance.
FLAGS=$($PY 04_build_prefs.py facttune --in $S/verified.jsonl --reward ${REWARD:-f1} --k ${K:-10} --pairs ${PAIRS:-best} \
    --margin ${MARGIN:-0} $([ "$LOSS" = kto ] && echo --unpaired) --eval-prompts "$EVAL" --out $R/prefs.jsonl \
    --eval-out $R/prefs_heldout.jsonl)

# Train. The paper: RMSprop, lr 5e-7, 1 epoch, 7B, after SFT; a 135M model needs a higher rate. 27 minutes.
$PY 05_train.py --loss ${LOSS:-dpo} $FLAGS --prefs $R/prefs.jsonl --eval-prefs $R/prefs_heldout.jsonl --model "${START:-$MODEL}" ${FULL---full} \
    --lr ${LR:-2e-5} --batch 32 --epochs ${EPOCHS:-2} --save-every 10 --out $R/tuned --seed ${SEED:-0} $TRAIN
$PY 06_eval.py plot facttune=$R/tuned/log.jsonl --out $R/curves.png
bash recipes/measure.sh $R/tuned
