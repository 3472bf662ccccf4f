# What all recipes take from the environment, and what it is if unset; each begins with `. recipes/variables.sh`.
#
# MODEL, PROMPTS, EVAL, CORPUS: a chat model, prompts to learn from and to measure on, passages. JUDGE, BASE_URL: a model on
# a server that takes apart, asks, rates and judges, instead of rules; it searches the whole corpus, with OPEN= the topic's
# page. N, ANSWERS: samples a prompt, answers a question. SEED, EPOCHS, LR: of sampling and training (EPOCHS: FLAME's of
# DPO, FactAlign has none). SAMPLE, TRAIN, MEASURE: more flags for 01 where the policy is sampled, for 05, for 01 in
# measure.sh, which win (but over T and n of its cool and greedy rows): TRAIN="--optim rmsprop". EVAL_K: another K.
# COOL=0: the tuned model not at T 0.3. FULL=--merge: LoRA instead of all weights (fp32: 16 bytes a parameter). R, S, B:
# folders of a run, of samples that runs share, the beginning of the base's files: other models, judges and ablations need
# others. SMALL=1: minutes, which prove nothing.
set -e
MODEL=${MODEL:-data/world/model}
EVAL=${EVAL:-data/prompts_eval.jsonl}
CORPUS=${CORPUS:-data/world/countries.jsonl}
PY=${PY:-.venv/bin/python}
R=${R:-runs/$(basename "$0" .sh)$SMALL}
S=${S:-runs/samples$SMALL}
B=${B:-runs/base$SMALL/base}
N=${N:-$([ "$SMALL" ] && echo 4 || echo 6)}
ANSWERS=${ANSWERS:-$([ "$SMALL" ] && echo 6 || echo 20)}

# Without a judge: rules, and the prompts' own checks. Exit 1 of 02 and 03 (some rows failed or are not judged, and are
# counted) lets a recipe go on.
ASK=${JUDGE:+--method llm --model $JUDGE --base-url $BASE_URL}
RATE=${JUDGE:+--model $JUDGE --base-url $BASE_URL}
OPEN=${OPEN-${JUDGE:+--open-search}}

prompts() {  # FILE: 120 train countries, each with two of its four aspects in turn; SMALL=1: six of them
  mkdir -p "$(dirname "$1")"
  [ "$PROMPTS" ] || awk 'int((NR - 1) / 4) % 2 == (NR - 1) % 2' data/prompts_train.jsonl \
      | head -$([ "$SMALL" ] && echo 12 || echo 240) > "$1"
  PROMPTS=${PROMPTS:-$1}
}

wanted() {  # FIELD VALUE: at least one of the prompts has it
  grep -qE "\"$1\": ?$2[,}]" "$PROMPTS" || { echo "$PROMPTS: expected prompts with \"$1\": $2, found none" >&2; exit 2; }
}
