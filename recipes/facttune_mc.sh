#!/usr/bin/env bash
# FactTune-MC (Tian et al. 2023, arXiv 2311.08401): no reference work. A response is the better, the surer the model is
# of its facts: it is asked about each again and again, and its confidence is how far its answers agree; then DPO.
# SMALL=1: 5 minutes on 2 CPU cores, which prove nothing.
# Other models, prompts, judges, corpora, flags: recipes/variables.sh. Stopped anywhere, the same command goes on.
set -e
. recipes/variables.sh
mkdir -p $R
prompts $S/prompts.jsonl

# Sample (the paper: 10 responses a prompt at T 1.0), and ask for each fact. Without a judge a question is the fact's
# beginning, to go on from: the paper's entity variant.
$PY 01_generate.py --prompts "$PROMPTS" --model "$MODEL" --n $N --seed ${SEED:-1} --out $S/samples.jsonl $SAMPLE
twice $PY 02_decompose.py $ASK --in $S/samples.jsonl --questions-out $S/questions.jsonl --out $S/asked.jsonl

# The model answers each question 20 times: T 1.0, top-p 0.9, at most 15 tokens (section 3.2 and the code).
$PY 01_generate.py --prompts $S/questions.jsonl --model "$MODEL" --n $ANSWERS --seed ${SEED:-1} --temperature 1 --top-p 0.9 \
    --max-new-tokens 15 --out $S/answers.jsonl
twice $PY 03_verify.py --method confidence --in $S/asked.jsonl --answers $S/answers.jsonl --out $R/confident.jsonl

# The mean over a response's facts of the largest share of like answers (max; its code has exp and neg_ent, too).
$PY 04_build_prefs.py facttune --in $R/confident.jsonl --reward ${REWARD:-max} --pairs ${PAIRS:-best} \
    --eval-prompts "$EVAL" --out $R/prefs.jsonl --eval-out $R/prefs_heldout.jsonl

# Train as facttune_fs.sh does. The paper: RMSprop, lr 5e-7, 1 epoch, 7B, after SFT.
$PY 05_train.py --prefs $R/prefs.jsonl --eval-prefs $R/prefs_heldout.jsonl --model "$MODEL" ${FULL---full} \
    --lr ${LR:-2e-5} --batch 32 --epochs ${EPOCHS:-2} --save-every 10 --out $R/tuned --seed ${SEED:-0} $TRAIN
$PY 06_eval.py plot facttune_mc=$R/tuned/log.jsonl --out $R/curves.png
bash recipes/measure.sh $R/tuned
