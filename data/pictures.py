"""
What 06_eval.py shows to the eye: one function a picture, each a matplotlib Figure made of plain
numbers, and the page. Colours are Okabe and Ito's, which colour-blind readers tell apart; where a
colour means something, a marker or a line style says it, too.
"""
import json
import math
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from statistics import fmean

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
LINES = ("-", "--", ":", "-.")
MARKERS = {"": "o", "-cool": "s", "-greedy": "^", " best-of": "*"}  # by decoding
PANELS = ("loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")))
GREY = "#767676"
ON_PAGE = ("f1_at_k", "supported", "unsupported", "words", "unjudged", "cut_by_length")


def canvas(panels=1, width=5.0, height=4.2):
    """(figure, its axes) of a row of panels."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display
    figure = Figure((1 + width * panels, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def legend(figure, title="", loc="outside upper center", ncols=4):
    """One legend for all panels."""
    found = {label: handle for axes in figure.axes
             for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(found.values(), found, loc=loc, ncols=ncols, title=title)


def styles(names):
    """{name: colour, line and marker}: seven pairs, then the same with another line."""
    return {name: {"color": COLOURS[i % 7], "marker": "os^Dv*P"[i % 7], "markersize": 5,
                   "linestyle": LINES[i // 7 % 4]} for i, name in enumerate(names)}


def save(figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def curves(logs, window=10):
    """Loss and rewards of {run: rows of its log.jsonl}, a panel for each that some run has."""
    logged = {name.removeprefix("eval_") for log in logs.values() for row in log for name in row}
    panels = [name for name in PANELS if name in logged]
    figure, panes = canvas(len(panels), width=3, height=4)
    for axes, name in zip(panes, panels):
        axes.set(xlabel="step", ylabel=name)
        for (run, log), style in zip(logs.items(), styles(logs).values()):
            steps = {row["step"]: row[name] for row in log if name in row}
            held = {row["step"]: row[f"eval_{name}"] for row in log if f"eval_{name}" in row}
            values = list(steps.values())
            means = [fmean(values[max(0, i - window):i]) for i in range(1, len(values) + 1)]
            axes.plot(list(steps), means, label=run, markevery=len(means) // 8 or 1, **style)
            axes.plot(list(held), list(held.values()), **{**style, "linestyle": "", "alpha": 0.6})
    if len(panels) > 1:  # some run has rewards: this is DPO's loss where policy is reference
        panes[0].axhline(math.log(2), color="black", linestyle=":", label="ln 2")
    legend(figure, f"lines: mean of {window} steps; single marks: held out")
    return figure


def plane(points, k):
    """Precision over recall at K (FactAlign, figure 3) of {name: {"precision", "recall_at_k"}},
    each {"mean", "lo", "hi"} in shares. Decodings of a model share a colour, hollow from the eighth
    on; round1, round2, ... are joined. Dotted: where the two means have the same harmonic mean."""
    figure, (axes,) = canvas(width=7.5, height=5)
    models, paths = {}, {}
    for name in points:
        model, number, decoding = re.fullmatch(
            r"(.*?)((?<=round)\d+)?(-cool|-greedy| best-of)?(?:-\d+)?", name).groups(default="")
        models.setdefault(model, (COLOURS[len(models) % 7], "none" if len(models) > 6 else "full"))
        x, y = points[name]["recall_at_k"], points[name]["precision"]
        if None in (x["mean"], y["mean"]):
            continue
        sides = [[[100 * (at["mean"] - (at["lo"] if at["lo"] is not None else at["mean"]))],
                  [100 * ((at["hi"] if at["hi"] is not None else at["mean"]) - at["mean"])]]
                 for at in (x, y)]
        axes.errorbar(100 * x["mean"], 100 * y["mean"], *reversed(sides), label=name, linewidth=1,
                      color=models[model][0], fillstyle=models[model][1], linestyle="",
                      marker=MARKERS[decoding], markersize=8)
        axes.annotate(name, (100 * x["mean"], 100 * y["mean"]), xytext=(5, 5), fontsize=7,
                      textcoords="offset points")
        if number:
            paths.setdefault((model, decoding), []).append((100 * x["mean"], 100 * y["mean"]))
    for (model, _), path in paths.items():
        axes.plot(*zip(*path), color=models[model][0])
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for f1 in range(5, 100, 5):
        recalls = [f1 / 2 + 0.1 + i / 4 for i in range(401) if f1 / 2 + 0.1 + i / 4 <= 100]
        axes.plot(recalls, [f1 * r / (2 * r - f1) for r in recalls], ":", color=GREY,
                  linewidth=0.7, zorder=0)
    axes.set(xlabel=f"recall at {k}, %", ylabel="precision, %", xlim=(max(0, left), right),
             ylim=(max(0, low), high), title="crosses: 95 % intervals; dotted: equal F1")
    legend(figure, loc="outside right upper", ncols=1)  # many names, some long
    return figure


def before_after(pairs, k):
    """F1@K of each prompt before and after, {name: [(base, tuned)]}, from largest loss to gain."""
    figure, panes = canvas(len(pairs), width=4.5)
    top = 100 * max((value for both in pairs.values() for pair in both for value in pair),
                    default=0)
    for axes, (name, both) in zip(panes, pairs.items()):
        both = sorted(both, key=lambda pair: (pair[1] - pair[0], pair))
        said = []
        for sign, label, mark, colour in ((1, "better", "^", COLOURS[0]), (0, "equal", "o", GREY),
                                          (-1, "worse", "v", COLOURS[1])):
            at = [i for i, (b, t) in enumerate(both) if (t > b) - (t < b) == sign]
            before, after = ([100 * both[i][side] for i in at] for side in (0, 1))
            axes.vlines(at, before, after, colour, linewidth=1)
            axes.plot(at, after, mark, color=colour, markersize=4, label=label)
            said.append(f"{len(at)} {label}")
        axes.set(title=f"{name}: {', '.join(said)}", xlabel="prompts, from loss to gain",
                 ylabel=f"F1@{k}, %", ylim=(-2, top + 3))
    legend(figure, "lines begin at the base's value, marks are the tuned model's")
    return figure


def facts_per_response(counts):
    """Shares of responses by their supported and unsupported facts, {name: [(S, NS)]}."""
    counts = {name: pairs for name, pairs in counts.items() if pairs}
    figure, panes = canvas(2)
    for axes, what, side in zip(panes, ("supported", "unsupported"), (0, 1)):
        for (name, pairs), style in zip(counts.items(), styles(counts).values()):
            numbers = [pair[side] for pair in pairs]
            upto = range(max(numbers, default=0) + 1)
            axes.plot(upto, [100 * numbers.count(n) / len(numbers) for n in upto], label=name,
                      **style)
        axes.set(xlabel=f"{what} facts of a response", ylabel="responses, %")
    legend(figure)
    return figure


def shift_by_position(found):
    """Shares of shifted and marginal tokens by position, {name: [{"from", "to", "tokens",
    "marginal", "shifted"}]}: APEFT compares prompts in and out of the domain of its tuning."""
    figure, panes = canvas(2)
    for axes, what in zip(panes, ("shifted", "marginal")):
        for (name, buckets), style in zip(found.items(), styles(found).values()):
            axes.plot([math.sqrt(b["from"] * b["to"]) for b in buckets],
                      [100 * b[what] for b in buckets], label=name, **style)
        axes.set(xlabel="position of the token in the response", ylabel=f"{what} tokens, %",
                 xscale="log", ylim=(-0.02, max(1, axes.get_ylim()[1])))
        axes.xaxis.set_major_formatter("{x:.0f}")
    legend(figure, "rank of the tuned model's choice in the base: shifted > 3, marginal 2 or 3")
    return figure


def reliability(found):
    """Precision over confidence, {measure: [{"confidence", "facts", "precision": {"mean", ...}}]};
    the larger a dot, the more facts."""
    figure, panes = canvas(len(found), width=3.5)
    for axes, (name, bins) in zip(panes, found.items()):
        most = max((b["facts"] for b in bins), default=1)
        x, y = [b["confidence"] for b in bins], [100 * b["precision"]["mean"] for b in bins]
        axes.plot((0, 1), (0, 100), ":", color=GREY, label="calibrated")
        axes.plot(x, y, color=COLOURS[0])
        axes.scatter(x, y, [200 * b["facts"] / most + 5 for b in bins], COLOURS[0])
        for b in bins:
            if b["precision"]["lo"] is not None:
                ends = 100 * b["precision"]["lo"], 100 * b["precision"]["hi"]
                axes.plot([b["confidence"]] * 2, ends, color=COLOURS[0], linewidth=1)
        axes.set(xlabel=f"confidence: {name}", ylabel="facts that the check supports, %",
                 xlim=(-0.03, 1.03), ylim=(-3, 103))
    legend(figure, "bars: 95 % intervals over topics; the larger a dot, the more facts")
    return figure


# ---------------------------------------------------------------------------------------------
# The page

def page(sets, rows, found, asked):
    """data/report.html filled in, as text. sets: {name: 06's responses}, rows: their summaries,
    found: the verdicts, asked: the prompts to show, with all their responses."""
    passages, prompts = {}, []  # evidence: each passage once, facts hold its number

    def place(e):
        title, field, text = (str(e.get(part, "")) for part in ("title", "field", "text"))
        return passages.setdefault((title, field, text[:1000] + "…" * (len(text) > 1000)),
                                   len(passages))

    def shown(response):
        row, label, values = response["row"], response["label"], response["values"]
        return {**{name: values[name] for name in ON_PAGE}, "abstained": row.get("abstained"),
                "text": row["response"], "sentences": [[part.get("start"), part.get("end"), [
                    [fact["text"], fact[label], fact.get("kind"),
                     [place(e) for e in fact.get("evidence") or []], bool(fact.get("repeats"))]
                    for fact in part["facts"]]]
                    for part in row["sentences"]]}

    for name in asked:
        sides = [[r for r in responses if r["prompt"] == name] for responses in sets.values()]
        f1 = [[r["values"]["f1_at_k"] for r in side] for side in sides]
        f1 = [[value for value in side if value is not None] for side in f1]
        row = sides[0][0]["row"]
        prompts.append({"id": name, "topic": sides[0][0]["topic"],
                        "f1": [fmean(side) if side else None for side in f1],
                        "prompt": row.get("prompt", row.get("input")),
                        "sides": [[shown(r) for r in side] for side in sides]})
    return fill("report.html", {"names": list(sets), "rows": list(rows.values()), "verdict": found,
                                "prompts": prompts, "passages": list(passages)})


def fill(name, data):
    """A page of data/ with its data in it, allowed to run its own code and nothing else."""
    html = (Path(__file__).parent / name).read_text(encoding="utf-8")
    for tag in ("style", "script"):
        code = html.split(f"<{tag}>")[1].split(f"</{tag}>")[0].encode()
        html = html.replace(f"sha256-{tag.upper()}",
                            f"sha256-{b64encode(sha256(code).digest()).decode()}")
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for risky in "<\u2028\u2029":  # they could end the block that the data stand in
        text = text.replace(risky, f"\\u{ord(risky):04x}")
    return html.replace(">DATA<", f">{text}<")
