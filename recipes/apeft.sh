#!/usr/bin/env bash
# APEFT (Yuan et al. 2024, arXiv 2406.12416): FactTune's pairs of paragraphs (D_g) and pairs of single facts that the
# model half knows (D_a), trained on together. We found nowhere how D_a is made, how large it is, how the two are
# weighed or with what rates: all of it is ours. SMALL=1: 5 minutes on 2 CPU cores, which prove nothing.
# Ablations: LOSS=dpo|ipo|rso|cpo|kto, ONLY=fact (D_g alone) or atomic, KEEP=unknown|potentially|known, WEIGHT=<of D_a>.
# Other models, prompts, judges, corpora, flags: recipes/variables.sh. Stopped anywhere, the same command goes on.
set -e
. recipes/variables.sh
LOSS=${LOSS:-dpo}
mkdir -p $R
prompts $S/prompts.jsonl

# D_g, as FactTune: samples of paragraphs, facts, verdicts. Each fact also becomes a question.
$PY 01_generate.py --prompts "$PROMPTS" --model "$MODEL" --n $N --seed ${SEED:-1} --out $S/samples.jsonl $SAMPLE
twice $PY 02_decompose.py $ASK --in $S/samples.jsonl --questions-out $S/questions.jsonl --out $S/asked.jsonl
twice $PY 03_verify.py $ASK $OPEN --in $S/asked.jsonl --corpus "$CORPUS" --out $S/judged.jsonl

# What does the model know? It answers each question 20 times; r is the share of answers that the verifier calls S.
$PY 01_generate.py --prompts $S/questions.jsonl --model "$MODEL" --n $ANSWERS --seed ${SEED:-1} --temperature 1 --top-p 0.9 \
    --max-new-tokens 15 --out $S/answers.jsonl
twice $PY 03_verify.py --method answers ${JUDGE:+--judge llm --model $JUDGE --base-url $BASE_URL $ASKED} $OPEN \
    --in $S/judged.jsonl --answers $S/answers.jsonl --corpus "$CORPUS" --out $R/known.jsonl

# D_a: of each question with 0 < r < 1 the commonest right answer over the commonest wrong one. Its prompt is the one
# they were sampled for: a judge's question, or "State one fact about X." and the fact's beginning, which opens both.
# One file holds both kinds: "fact" is D_g, "atomic" is D_a. KTO takes each side as a row of its own; FLAGS are the
# weights with which good and bad ones balance.
FLAGS=$($PY 04_build_prefs.py apeft --in $R/known.jsonl --answers $S/answers.jsonl --keep ${KEEP:-potentially} \
    --reward ${REWARD:-f1} --k ${K:-10} --margin ${MARGIN:-0} $([ $LOSS = kto ] && echo --unpaired) ${ONLY:+--only $ONLY} --eval-prompts "$EVAL" \
    --out $R/prefs.jsonl --eval-out $R/heldout.jsonl)

# Train on the two together, a pair of D_a weighing as much as one of D_g.
$PY 05_train.py --loss $LOSS $FLAGS --prefs $R/prefs.jsonl --eval-prefs $R/heldout.jsonl --model "$MODEL" ${FULL---full} \
    --kind-weights ${ONLY:-atomic}=${WEIGHT:-1} --lr ${LR:-2e-5} --batch 32 --epochs ${EPOCHS:-2} --save-every 10 \
    --out $R/tuned --seed ${SEED:-0} $TRAIN
$PY 06_eval.py plot apeft=$R/tuned/log.jsonl --out $R/curves.png
bash recipes/measure.sh $R/tuned
