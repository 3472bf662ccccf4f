# What all recipes take from the environment, and what it is if unset; each begins with `. recipes/variables.sh`.
#
# MODEL, PROMPTS, EVAL, CORPUS: a chat model, prompts to learn from and to measure on, passages. JUDGE, BASE_URL: a model
# on a server that takes apart, asks, rates and judges, instead of rules; it searches the whole corpus, with OPEN= the
# topic's page. N, ANSWERS: samples a prompt, answers a question. SEED, EPOCHS, LR: of sampling and training (EPOCHS:
# FLAME's of DPO, FactAlign has none). SAMPLE, TRAIN, MEASURE: more flags for 01 where the policy is sampled, for 05, for
# 01 in measure.sh, which win (but over T and n of its cool and greedy rows): TRAIN="--optim rmsprop". ASKED: more flags
# for 02 and 03 where the judge is asked: ASKED="--max-tokens 8192" for one that thinks first. EVAL_K: another K. COOL=0:
# the tuned model not at T 0.3. FULL=--merge: LoRA instead of all weights (these: 16 bytes a parameter, 12 a checkpoint).
# 8B on 80 GB: FULL=--merge TRAIN="--microbatch 4 --gradient-checkpointing". R, S, B: folders of a run, of samples that
# runs share, the beginning of the base's files: other models, judges and ablations need others. SMALL=1: minutes, which
# prove nothing.
set -e
case $1 in -h | --help)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
esac
[ "$SMALL" != 0 ] || SMALL=
MODEL=${MODEL:-data/world/model}
EVAL=${EVAL:-data/prompts_eval.jsonl}
CORPUS=${CORPUS:-data/world/countries.jsonl}
PY=${PY:-.venv/bin/python}
R=${R:-runs/$(basename "$0" .sh)$SMALL}
S=${S:-runs/samples$SMALL}
B=${B:-runs/base$SMALL/base}
N=${N:-$([ "$SMALL" ] && echo 4 || echo 6)}
ANSWERS=${ANSWERS:-$([ "$SMALL" ] && echo 6 || echo 20)}

for file in "$EVAL" "$CORPUS" ${PROMPTS:+"$PROMPTS"}; do
  [ -e "$file" ] || { echo "$file: no such file (EVAL, CORPUS or PROMPTS)" >&2; exit 2; }
done

# Without a judge: rules, and the prompts' own checks.
if [ "$JUDGE" ] && [ -z "$BASE_URL" ]; then
  echo "expected with JUDGE=$JUDGE also BASE_URL=http://.../v1 (OpenAI: https://api.openai.com/v1), found none" >&2
  exit 2
fi
ASK=${JUDGE:+--method llm --model $JUDGE --base-url $BASE_URL $ASKED}
RATE=${JUDGE:+--model $JUDGE --base-url $BASE_URL $ASKED}
OPEN=${OPEN-${JUDGE:+--open-search}}

prompts() {  # FILE: 120 train countries, each with two of its four aspects in turn; SMALL=1: six of them
  mkdir -p "$(dirname "$1")"
  [ "$PROMPTS" ] || awk 'int((NR - 1) / 4) % 2 == (NR - 1) % 2' data/prompts_train.jsonl \
      | head -$([ "$SMALL" ] && echo 12 || echo 240) > "$1"
  PROMPTS=${PROMPTS:-$1}
}

twice() {  # COMMAND: exit 1 (rows failed, or are not judged) has a second try; then the recipe goes on without them
  local code try
  for try in 1 2; do
    code=0
    "$@" || code=$?
    [ $code = 1 ] || return $code
  done
}

wanted() {  # FIELD VALUE: at least one of the prompts has it
  grep -qE "\"$1\": ?$2[,}]" "$PROMPTS" || { echo "$PROMPTS: expected prompts with \"$1\": $2, found none" >&2; exit 2; }
}
