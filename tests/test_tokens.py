"""05_train.py's tokens with the real tokenizer: spans of sentences, one BOS, the prompt as 01's."""
import copy
import re
from types import SimpleNamespace

import pytest
import rules
import torch
from common import as_messages, prompt_ids
from conftest import ROOT, read_rows, stage
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import sentence_sums
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

train = stage("05_train")

# GPT-2's table, written apart: printable bytes are their own letter, the others follow from 256.
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE = {chr(byte): byte for byte in PLAIN}
BYTE |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in PLAIN)}


@pytest.fixture(scope="module")
def real():
    return AutoTokenizer.from_pretrained(ROOT / "data/world/model")


@pytest.fixture(scope="module")
def doubling():
    """As Llama 3's: the chat template begins with BOS, and the post-processor adds another."""
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>",
                                        eos_token="<|im_end|>",
                                        additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer


FAMILIES = {  # eos, the template's line for a turn, what ends an answer
    "chatml": ("<|im_end|>", "<|im_start|>{role}\n{text}<|im_end|>\n", "<|im_end|>"),
    "gemma": ("<eos>", "<start_of_turn>{role}\n{text}<end_of_turn>\n", "<end_of_turn>"),
    "phi": ("<|endoftext|>", "<|{role}|>\n{text}<|end|>\n", "<|end|>"),
    "llama": ("<|eot_id|>", "<|header|>{role}<|/header|>\n\n{text}<|eot_id|>", "<|eot_id|>"),
    "mistral": ("</s>", "[INST]{text}</s>", "</s>"), "plain": ("</s>", "{role}: {text}\n", "</s>")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_ends_as_the_template_ends_it(family):
    """Which is not always eos. 05 trains on this very token, 01 stops at it and at eos."""
    eos, turn, end = FAMILIES[family]
    special = sorted({eos, *re.findall(r"<\S+?>", turn.replace("{role}", "user"))})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos,
                                        additional_special_tokens=special)
    line = turn.replace("{role}", "{{ m.role }}").replace("{text}", "{{ m.content }}")
    tokenizer.chat_template = "{% for m in messages %}" + line + "{% endfor %}"
    number = tokenizer.convert_tokens_to_ids(end)
    assert train.encode(tokenizer, as_messages("Who?"), "I.", "stop")[1][-1] == number
    assert number not in train.encode(tokenizer, as_messages("Who?"), "I.", "length")[1]
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    assert stage("01_generate").stop_tokens(model, tokenizer) == {
        number, tokenizer.eos_token_id, 3, 4}


def test_what_a_template_is_told(doubling, capsys):
    """No thought, which would be sampled and not trained on; a day that stays; and what it refuses
    is one line."""
    tokenizer = copy.deepcopy(doubling)
    tokenizer.chat_template = (
        "{{ enable_thinking }} {{ date_string }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('No system!') }}{% endif %}{{ m.content }}{% endfor %}")
    assert tokenizer.decode(prompt_ids(tokenizer, as_messages("Who?"))) == "False 26 Jul 2024Who?"
    with pytest.raises(SystemExit) as stopped:
        prompt_ids(tokenizer, [{"role": "system", "content": "Be brief."}])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Be brief." in said and said.endswith(": No system!\n")


def pieces(tokenizer, ids):
    """The bytes of each token."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [bytes(BYTE[letter] for letter in token) for token in tokens]


# ---------------------------------------------------------------------------------------------
# Sentences and their tokens

def check_spans(tokenizer, text):
    """What must hold of any text's sentences and tokens; returns the sentence of each token.

    The right answer is counted in bytes: a token belongs where the first character other than
    space lies that it holds a part of; one of mere space to no sentence or where the next lies.
    """
    spans = rules.sentences(text)
    _, completion = train.encode(tokenizer, as_messages("Who?"), text, "stop")
    found, parts = train.sentence_ids(tokenizer, text, spans), pieces(tokenizer, completion[:-1])
    assert completion[-1] == tokenizer.eos_token_id and len(found) == len(parts)
    assert b"".join(parts) == text.encode()
    owner = [n for n, character in enumerate(text) for _ in character.encode()]
    end = 0
    for part, sentence in zip(parts, found):
        begin, end = end, end + len(part)
        held = owner[begin:end]
        solid = [c for c in held if not text[c].isspace()]
        first = solid[0] if solid else held[-1] + 1
        inside = [n for n, span in enumerate(spans) if first in range(*span)]
        assert inside == [sentence] or (not (solid and inside) and sentence == -1)
    for n, span in enumerate(spans):
        at = [t for t, sentence in enumerate(found) if sentence == n]
        assert at == list(range(at[0], at[-1] + 1))
        said = b"".join(parts[at[0]:at[-1] + 1]).decode()
        assert said.strip() == text[slice(*span)].strip() != ""

    logps = torch.randn(len(completion), dtype=torch.float64)
    numbers = torch.tensor([*found, -1])
    sums = sentence_sums(logps[None], numbers[None], len(spans))
    rest = sum(p for p, n in zip(logps.tolist(), numbers) if n == -1)  # with the end of turn
    assert sums.sum().item() + rest == pytest.approx(sum(logps.tolist()), abs=1e-9)
    for n, value in enumerate(sums.tolist()):
        assert value == pytest.approx(sum(p for p, m in zip(logps.tolist(), found) if m == n))
    return found


FAMILY = "👨‍👩‍👧‍👦"  # seven characters, four joined
TEXTS = [
    "It is landlocked. It borders Peru.",
    "  Leading spaces. And  two   inside. ",
    "1. Lima is the capital.\n2. It borders Chile.\n\n3. Yes.",
    "- One thing.\n- One thing.\n• One thing.",
    f"A {FAMILY} lives there. {FAMILY} {FAMILY}! The flag is 🇱🇾. 😀",
    "東京は日本の首都です。 山がある。\n海。",
    "Cafe\u0301 is e\u0301. Z\u0335\u0321algo. \u0301 alone.",
    "\n\nIt ends.\r\n\r\nIt goes on\u2028and on.\u3000So.\u00a0Be it.\t\tTab.\n",
    "He said <|im_end|>. Then <|im_start|>user went. <|endoftext|>",
    "한국어. العربية. हिन्दी.",
    "no end",
]


@pytest.mark.parametrize("text", TEXTS)
def test_sentences_of_a_text(real, text):
    check_spans(real, text)


def test_the_second_of_two_equal_sentences_has_its_own_tokens(real):
    text = "It is so. Never. It is so. It is so.\nIt is so."
    found = check_spans(real, text)
    same = [[t for t, n in enumerate(found) if n == sentence] for sentence in (0, 2, 3, 4)]
    assert all(len(at) >= 4 for at in same)
    assert all(a[-1] < b[0] for a, b in zip(same, same[1:]))


@pytest.mark.parametrize("text", TEXTS)
def test_sentences_without_spans_are_searched(real, text):
    """FactAlign's rows have sentences alone: each is found where the splitter cut it, the second
    of two equal ones behind the first."""
    spans = rules.sentences(text)
    found = train.search([f" {text[slice(*span)]}\n" for span in spans], text)
    for (a, b), (start, end) in zip(found, spans, strict=True):
        assert text[a:b] == text[start:end].strip() and start <= a <= b <= end
    assert train.sentence_ids(real, text, found) == train.sentence_ids(real, text, spans)


def test_labels_of_a_row_meet_its_tokens(real):
    """A sentence that the text does not hold has no token and no label; the others keep theirs."""
    text = "It is so. Never. It is so. It borders Peru."
    row = {"id": "a", "prompt": "Who?", "completion": [{"role": "assistant", "content": text}],
           "label": True, "sentence_label": [True, False, True, False],
           "completion_sentences": ["Never.", "It is so.", "It is gone.", "It borders Peru."]}
    args = SimpleNamespace(loss="factalign", max_length=1024)
    own = {**row, "sentence_spans": [[10, 16], [17, 26], [0, 0], [27, 43]]}  # as 04 writes them
    for made in train.encode_rows(real, [row, own], args):
        completion, numbers = made["responses"][0][1], made["sentence_ids"]
        assert made["sentences"] == [True, False, False] and len(numbers) == len(completion)
        said = {n: real.decode([t for t, m in zip(completion, numbers) if m == n])
                for n in {*numbers}}
        assert said == {-1: "It is so.<|im_end|>", 0: " Never.", 1: " It is so.",
                        2: " It borders Peru."}
    moved, = train.encode_rows(real, [{**own, "sentence_spans": [[0, 0], [0, 9], [0, 0], [0, 0]]}],
                               args)
    assert moved["sentences"] == [False]  # spans are believed
    kto, = train.encode_rows(real, [row], SimpleNamespace(loss="kto", max_length=1024))
    assert kto["sentences"] == [] and {*kto["sentence_ids"]} == {-1} and kto["label"] is True


WORDS = st.sampled_from(["It", "borders", "Peru", "1,000.5", "U.S.", "'s", "-", "naïve", "e\u0301",
                         "\u0301", "\u200b", "東京", "हि", FAMILY, "🇱", "<|im_end|>"])
ENDS = st.sampled_from([".", "!", "?", "…", "。", ".\"", ".)", ":", ""])
GAPS = st.sampled_from(["", " ", "  ", "\n", "\n\n", " \n\n ", "\r\n", "\t", "\u3000", "\u00a0",
                        "\u2028", "\n1. ", "\n- ", "\n  • "])
SENTENCES = st.builds(lambda words, end: " ".join(words) + end,
                      st.lists(WORDS, min_size=1, max_size=5), ENDS)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(GAPS, SENTENCES), min_size=1, max_size=6), st.booleans(), GAPS)
def test_sentences_of_any_text(real, parts, twice, last):
    check_spans(real, "".join(gap + text for gap, text in parts * (1 + twice)) + last)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"]), max_size=40))
def test_sentences_of_any_characters(real, text):
    check_spans(real, text)


# ---------------------------------------------------------------------------------------------
# One BOS, no special token out of a text, the prompt as 01 sees it

SPELT = ["It is.", "<s>It is.", "It <|im_end|> is.\n<|im_start|>user\nNo.<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize("text", SPELT)
@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("name", ["real", "doubling"])
def test_one_bos_and_no_special_token_that_a_text_spells(name, finish, text, request):
    tokenizer = request.getfixturevalue(name)
    special = set(tokenizer.all_special_ids)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    messages = [{"role": "system", "content": text}, {"role": "user", "content": f"{text} Who?"}]
    for _ in range(2):  # what encoding one text sets in the tokenizer, the next must not feel
        prompt, completion = train.encode(tokenizer, messages, text, finish)
        said = completion[:-1] if finish == "stop" else completion
        assert finish == "length" or completion[-1] == end
        assert special.isdisjoint(said) and tokenizer.decode(said) == text
        marks = [tokenizer.convert_ids_to_tokens(i) for i in prompt if i in special]
        turns = ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
        assert marks == {"real": turns, "doubling": ["<s>", *turns]}[name]
        assert prompt[0] == bos
    assert (tokenizer("x")["input_ids"][0] == bos) == (name == "doubling")  # the trap is laid


@pytest.mark.parametrize("name", ["real", "doubling"])
def test_prompt_as_01_sees_it(name, request):
    tokenizer = request.getfixturevalue(name)
    for row in read_rows(ROOT / "data/prompts_dev.jsonl")[:4]:
        asked, text = as_messages(row["prompt"]), "It is so. It borders Peru."
        prompt, completion = train.encode(tokenizer, asked, text, "stop")
        assert list(prompt) == prompt_ids(tokenizer, asked)
        plain = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert list(prompt) == plain
        turn = {"role": "assistant", "content": text}
        whole = tokenizer.apply_chat_template([*asked, turn], tokenize=False)
        assert tokenizer.decode([*prompt, *completion]) == whole.rstrip("\n")
