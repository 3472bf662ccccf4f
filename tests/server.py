"""
A server on loopback that speaks OpenAI's chat protocol and goes wrong on purpose, for tests.

It runs in its own process (`python tests/server.py JSON` prints its address) and keeps the books
that tests trust: `with serve(...) as server:` gives server.url, server.counts() and server.seen().
What serve() takes, all optional:

delay    seconds before each reply
refuses  {parameter: "openai", "vllm" or "fastapi"}: what holds it gets a 400 (422) in their words
script   {part of a text: [fault, ...]}: what goes wrong the first, second, ... time such a text
         comes ("" is part of all); then all is well, unless the list ends in "forever"
faults   {fault: share of the calls}: which ones depends on `seed`, the text and how often it came

A fault is "drop" (hangs up in the middle of the body), a status or a key of GARBAGE. The text of a
request is what its user's turns say: parameters are no part of it, asking again with another seed
is coming again.
"""
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.request import urlopen


# ---------------------------------------------------------------------------------------------
# Models: (the user's last turn, the request) -> text, or a dict of "text", "finish", "reasoning"

def statement(text):
    """What a prompt is about: the rest of its last line that begins with "Statement:", or
    "Sentence:" or the like; else all of it."""
    found = re.findall(r"^(?:Statement|Sentence|Claim|Fact):[ \t]*(\S.*)$", text, re.M)
    return found[-1].strip() if found else text.strip()


def supported(text):
    """The judge's own view of a statement, as good as a coin; two of three are "[Supported]"."""
    return hashlib.sha256(f"judge {text}".encode()).digest()[0] % 3 > 0


def judge(text, request):
    """Thinks the reverse of what it says at last: aloud, in a field of its own, or in <think>."""
    words = ["[Not Supported]", "[Supported]"]
    last = words[supported(statement(text))]
    first = words[not supported(statement(text))]
    thought = f"At first sight this looks {first}, so {first} it is."
    form = hashlib.sha256(text.encode()).digest()[0] % 3
    if form == 0:
        return {"text": f"Looked at again, no.\n{last}", "reasoning": thought}
    return f"<think>{thought}</think>\n{last}" if form == 1 else f"{thought} No.\n{last}"


def repeat(text, request):
    """Writes one and the same search query for ever; judges where a verdict is wanted."""
    return judge(text, request) if "Supported]" in text else "Query: capital and largest city"


def seek(text, request):
    """Searches for the statement's last words, one more for each passage found; then judges."""
    words = statement(text).split()[-1 - text.count("\n- "):]
    return judge(text, request) if "Supported]" in text else f"As yet.\nQuery: {' '.join(words)}"


def reluctant(text, request):
    """Gives no verdict on a statement with "perhaps" the first three times; else repeat."""
    coy = "perhaps" in statement(text) and "Supported]" in text
    SHY[text] += coy
    return "Hard to say." if coy and SHY[text] <= 3 else repeat(text, request)


def obedient(text, request):
    """Believes the last verdict, if any, in what it was given to judge."""
    told = re.findall(r"\[(?:Not )?Supported\]", text.rpartition("\n\n")[0])
    return (told or ["[Not Supported]"])[-1] if "Supported]" in text else "Query: capital"


def rater(text, request):
    """Rates 1 to 5 by the seed. "mumble" is never rated where that is 2 or more, "stutter" at 0."""
    seed = request["seed"]
    silent = "mumble" in text and seed > 1 or "stutter" in text and seed == 0
    return "Rating: none" if silent else f"So.\nRating: [{seed * 3 % 5 + 1}]"


def first_place(text, request):
    """Prefers what stands first; one with "perhaps" in it gets no verdict the first three times."""
    SHY[text] += "perhaps" in text
    return "Hard to say." if 0 < SHY[text] <= 3 else "Both are fine, [[B]] is short.\n\n[[A]]"


def longer(text, request):
    """Prefers the longer of two responses; rates one by its words, "yes" where it has five."""
    found = re.search(r"(?s)\nResponse A:\n(.*)\n\nResponse B:\n(.*)\n\nCompare", text)
    if found:
        a, b = (len(part.split()) for part in found.groups())
        better = "tie" if a == b else "AB"[b > a]
        return f"<think>[[A]] or [[B]]?</think>\nFinal verdict: [[{better}]]"
    n = len(re.search(r"(?s)\n(?:Reply|Answer to rate):\n(.*?)\n\n", text)[1].split())
    return f"[[{'yes' if n >= 5 else 'no'}]]" if "[[yes]]" in text else f"It has {n}.\n[[{n}]]"


def gullible(text, request):
    """Believes the last verdict in what it was given to judge; else sees no difference."""
    told = re.findall(r"\[+(?:A|B|yes|\d+\.?\d*)\]+", text.rpartition("\n\n")[0])
    stand_in = "[[no]]" if "[[yes]]" in text else "[[tie]]" if "[[tie]]" in text else "[[3]]"
    return (told or [stand_in])[-1]


def items(text, request):
    parts = re.split(r",\s+|\s+and\s+", statement(text).rstrip("."))
    return "\n".join(f"- {part}." for part in parts if part)


def facts(text, request):
    """Takes sentences apart as 02 asks for it; a word in capitals makes it go wrong."""
    wanted = text.strip().split("\n")[-1]
    topic = re.findall(r"^Topic: (.*)$", text, re.M)[-1:]
    given = re.findall(r"^\d+\. (.*)$", text.rpartition("\nFacts:\n")[2], re.M)
    about = statement(text)
    if wanted == "Facts:" and "CHATTY" in about:
        return "I am sorry, but I cannot take this sentence apart. It is about a country."
    if wanted == "Facts:" and "PONDER" in about:
        return "<think>\n- It is a thought that never ends."
    if wanted == "Facts:" and about.startswith("Sure"):
        return "<think>- It states nothing.</think>\nNone."
    if wanted == "Facts:":
        listed = "\n".join(f"- {part}." for part in about.rstrip(".").split(", "))
        finish = "length" if "CUT" in about else "stop"
        return {"text": f"The facts are:\n\n{listed}", "finish": finish}
    if wanted == "Facts that stand alone:":
        given = given[:-1] if "MISCOUNT" in str(given) else given
        return "\n".join(f"{i}. {re.sub('^It', topic[0], fact)}" for i, fact in enumerate(given, 1))
    if wanted == "Verdicts:":
        return "\n".join(f"{i}. {fact} [{'Irr' if 'gossip' in fact else 'R'}elevant]"
                         for i, fact in enumerate(given, 1))
    first, _, last = about.rstrip(".").rpartition(" ")
    told = last if "LEAK" in about else "what"
    return "None." if "UNASKED" in about else f"Question: {first} {told}?\nAnswer: {last}."


MODELS = {
    "echo": lambda text, request: text,
    "seed": lambda text, request: f"seed {request.get('seed')}",
    "judge": judge,
    "repeat": repeat,
    "list": items,
    "garbage-verdict": lambda text, request: "[Supported] and [Not Supported]? Hard to say.",
    "facts": facts,
    "half-character": lambda text, request: "half of an emoji: \ud83d",
    "seek": seek,
    "reluctant": reluctant,
    "obedient": obedient,
    "parrot": lambda text, request: f"Query: capital\nI read:\n{statement(text)}",
    "rater": rater,
    "first-place": first_place,
    "longer": longer,
    "gullible": gullible,
}
SHY = Counter()


# ---------------------------------------------------------------------------------------------
# Faults: (status, body)

GARBAGE = {
    "html": "<html><body>502 Bad Gateway</body></html>",
    "other-json": '{"status": "ok"}',
    "null": "null",
    "array": "[1, 2]",
    "broken-json": '{"choices": [{"message": {"content": "cut of',
    "no-choices": '{"choices": []}',
    "no-message": '{"choices": [{"finish_reason": "stop"}]}',
    "parts": '{"choices": [{"finish_reason": "stop", "message": {"content": [{"text": "x"}]}}]}',
    "deep": "[" * 200_000,
}
ERRORS = {  # %s is the Authorization header, which some servers hand back; %t the text
    "400": "Bad request: it came with %s.",
    "quote": "Could not make a prompt of '%t', which came with %s.",
    "401": "Incorrect API key provided: %s. You can find yours in your account.",
    "403": "You are not allowed to sample from this model, %s.",
    "404": "The model does not exist or you do not have access to it.",
    "429": "Rate limit reached for requests of %s. Please try again.",
    "500": "The server had an error while processing %s. Sorry about that!",
    "context": "This model's maximum context length is 4096 tokens. However, you requested 4200 "
               "tokens (4000 in the messages, 200 in the completion). Please reduce the length of "
               "the messages or completion.",
    "context-vllm": "'max_tokens' or 'max_completion_tokens' is too large: 200. This model's "
                    "maximum context length is 4096 tokens and your request has 4000 input tokens "
                    "(200 > 4096 - 4000).",
}
PARAM = {"context": "messages", "context-vllm": "max_tokens"}


def error(status, message, param=None):
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return status, json.dumps({"error": body})


def fault(kind, key, text):
    if kind in GARBAGE:
        return 200, GARBAGE[kind]
    status = int(kind) if kind.isdigit() else 400
    return error(status, ERRORS[kind].replace("%s", str(key)).replace("%t", text), PARAM.get(kind))


def refusal(name, style):
    """What a server says that does not take a parameter."""
    if style == "openai" and name == "max_tokens":
        return error(400, "Unsupported parameter: 'max_tokens' is not supported with this model. "
                     "Use 'max_completion_tokens' instead.", name)
    if style == "openai":
        return error(400, f"Unsupported value: '{name}' does not support 0.7 with this model. Only "
                     "the default (1) value is supported.", name)
    extra = {"type": "extra_forbidden", "loc": ["body", name],
             "msg": "Extra inputs are not permitted", "input": 1}
    if style == "fastapi":
        return 422, json.dumps({"detail": [extra]})
    return 400, json.dumps({"object": "error", "message": str([extra]), "type": "Bad Request",
                            "param": None, "code": 400})


def chosen(config, text, times):
    """The fault that meets a text when it comes for the n-th time (from 0), or None."""
    for part, faults in config.get("script", {}).items():
        if part in text:
            forever = faults[-1] == "forever"
            faults = faults[:-1] if forever else faults
            if times < len(faults) or forever:
                return faults[min(times, len(faults) - 1)]
    draw = random.Random(f"{config.get('seed', 0)} {times} {text}").random()
    for kind, share in config.get("faults", {}).items():
        draw -= share
        if draw < 0:
            return kind
    return None


# ---------------------------------------------------------------------------------------------
# The server

def completion(request, text):
    """A chat completion; a token is a word."""
    said = MODELS[request["model"]](text, request)
    said = said if isinstance(said, dict) else {"text": said}
    words = re.findall(r"\s*\S+", said["text"])
    limit = request.get("max_completion_tokens", request.get("max_tokens", 10_000))
    message = {"role": "assistant", "content": "".join(words[:limit])}
    if "reasoning" in said:
        message["reasoning"] = said["reasoning"]
    finish = said.get("finish", "length" if len(words) > limit else "stop")
    usage = {"prompt_tokens": len(text.split()), "completion_tokens": min(len(words), limit)}
    return json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "created": 1,
                       "model": request["model"],
                       "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                       "usage": usage | {"total_tokens": sum(usage.values())}})


def run(config):
    guard, counts, outcomes = threading.Lock(), Counter(), Counter()
    parent = os.getppid()
    times, seen, good, flying = Counter(), [], set(), set()

    def answer(request, key):
        """(status, body, outcome); the outcome is "good", "refused NAME" or the fault."""
        text = "\n".join(m["content"] for m in request["messages"] if m["role"] == "user")
        with guard:
            counts["requests"] += 1
            counts["authorized"] += (key or "").startswith("Bearer sk-")  # no stand-in for a key
            nth = times[text]
            times[text] += 1
        time.sleep(config.get("delay", 0))
        for name, style in config.get("refuses", {}).items():
            if name in request:
                return *refusal(name, style), f"refused {name}"
        kind = chosen(config, text, nth)
        if request["model"] not in MODELS:
            kind = "404"
        if kind and kind != "drop":
            return *fault(kind, key, text), kind
        return 200, completion(request, text), kind or "good"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # headers and body in one packet

        def send(self, status, body, outcome="good"):
            body = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if outcome == "html" else
                             "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 429:  # openai waits at least half a second where it is told to wait 0
                self.send_header("Retry-After", "0")
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            if outcome == "drop":
                body = body[:len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)
            self.wfile.flush()

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = json.loads(body)
            with guard:
                flying.add(self)
                counts["most_at_once"] = max(counts["most_at_once"], len(flying))
            status, reply, outcome = answer(request, self.headers.get("Authorization"))
            with guard:  # before the client can know of it
                flying.discard(self)
                outcomes[outcome] += 1
                seen.append({"outcome": outcome, **request})
                if outcome == "good":
                    good.add(body)
            self.send(status, reply, outcome)

        def do_GET(self):
            with guard:
                pages = {"/counts": {"good": 0, "requests": 0, "most_at_once": 0, "authorized": 0,
                                     **counts, **outcomes, "distinct": len(good)},
                         "/seen": seen,
                         "/v1/models": {"object": "list", "data": [
                             {"id": name, "object": "model"} for name in MODELS]}}
                page = pages.get(self.path)
            self.send(200 if page is not None else 404, json.dumps(page))

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256  # the 5 of the library would make 32 clients wait a second

        def handle_error(self, request, client_address):
            if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.getppid() == parent:  # a test that was killed leaves no server behind
        time.sleep(1)


@contextmanager
def serve(**config):
    """A server of its own for a test: .url (ends in /v1), .counts() and .seen().

    counts   requests; good, and how many other outcomes of each kind; distinct good requests;
             most_at_once; authorized (how many came with a key, sk-...)
    seen     the requests in the order of their answers, each with its "outcome"
    """
    process = subprocess.Popen([sys.executable, __file__, json.dumps(config)], text=True,
                               stdout=subprocess.PIPE)
    try:
        root = process.stdout.readline().strip()

        def get(path):
            with urlopen(root + path) as page:
                return json.load(page)

        yield SimpleNamespace(url=f"{root}/v1", counts=lambda: get("/counts"),
                              seen=lambda: get("/seen"))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    run(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
