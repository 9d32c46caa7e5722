"""Random calls: what a client sends, and the plan that tells the server how to answer.

The plan travels in the call's metadata, with seeds in place of what can be long, so that the
server's answer depends on nothing but the request.
"""

import json
import random
import string

KEY = "plan-bin"
KINDS = ("unary_unary", "stream_unary", "unary_stream", "stream_stream")
# What may stand in a path (RFC 3986, with "/" and "?" anywhere), and what most allow beside.
PATH = string.ascii_letters + string.digits + "-._~!$&'()*+,;=:@/?" + "|[]^\\{}"
NAME = string.ascii_lowercase + string.digits + "-._"
VALUE = "".join(map(chr, range(0x20, 0x7F)))
# Names that HTTP/2 or gRPC keep for themselves.
RESERVED = {"connection", "content-type", "host", "keep-alive", "te", "upgrade", "user-agent"}


class Sent:
    """A call, as its client makes it."""

    def __init__(self, seed, number):
        self.random = chance = random.Random(f"{seed} {number}")
        self.name = f"random.{number}"
        self.kind = chance.choice(KINDS)
        self.method = "/" + "/".join(self.path_segment() for _ in range(chance.choice((2, 2, 2, 1, 3))))
        count = 1 if self.kind.startswith("unary") else chance.choice((0, 1, 2, 5, 20))
        self.requests = [message(chance) for _ in range(count)]
        plan = self.plan(count)
        self.metadata = [*metadata(chance), (KEY, json.dumps(plan).encode())]
        chance.shuffle(self.metadata)
        self.timeout = chance.choice((None, 30, 59.5, 3000))
        self.compression = chance.choice((None, None, 1, 2))

    def path_segment(self):
        chance = self.random
        pieces = [*PATH, *(f"%{byte:02X}" for byte in range(256))]
        return "".join(chance.choices(pieces, k=chance.choice((1, 10, 30, 200))))

    def plan(self, requests):
        chance = self.random
        code = chance.choice((0, 0, 0, *range(17)))
        if self.kind.endswith("unary"):
            answers = 1 if code == 0 else 0
        else:
            answers = chance.choice((0, 1, 2, 5, 20))
        # After so many requests comes a message.
        answers = sorted(
            [chance.randint(0, requests), chance.getrandbits(32)] for _ in range(answers)
        )
        gzip = chance.random() < 0.2
        if self.kind == "stream_unary" and any(after == 0 for after, _ in answers):
            # C-core 1.51 asks for the message before it asks for the metadata that name its
            # compression; where the server waits for nothing, it can come still compressed.
            gzip = False
        return {
            "initial": chance.choice((None, chance.getrandbits(32))),
            "trailing": chance.getrandbits(32),
            "answers": answers,
            "to_the_end": chance.random() < 0.8,
            "gzip": gzip,
            "code": code,
            "details": "".join(chance.choices(VALUE + "\n\tüß✓失🦀", k=chance.choice((0, 5, 100)))),
        }


class Answer:
    """What a plan asks the server to do."""

    def __init__(self, plan):
        of = random.Random
        self.initial = [] if plan["initial"] is None else metadata(of(plan["initial"]))
        self.trailing = metadata(of(plan["trailing"]))
        self.answers = ((after, message(of(seed))) for after, seed in plan["answers"])
        self.to_the_end = plan["to_the_end"]
        self.gzip = plan["gzip"]
        self.code = plan["code"]
        self.details = plan["details"]


def of(metadata):
    """The plan in the metadata of a call, if there is one."""
    plan = dict(metadata).get(KEY)
    return plan and Answer(json.loads(plan))


def message(chance):
    """Mostly small; half of them worth compressing."""
    size = chance.choice((0, 1, 10, 100, 100, 1000, 1000, 5000, 20_000, chance.randint(0, 200_000)))
    if chance.random() < 0.5:
        return chance.randbytes(size)
    return (b"%d " % chance.getrandbits(16) * size)[:size]


def metadata(chance):
    pairs = []
    for _ in range(chance.choice((0, 1, 3, 10))):
        name = "".join(chance.choices(NAME, k=chance.choice((1, 5, 20, 60))))
        if name in RESERVED or name.startswith("grpc-") or name.endswith("-bin"):
            continue
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            size = chance.choice((0, 1, 10, 100, 1000))
            if chance.random() < 0.4:
                pairs.append((f"{name}-bin", chance.randbytes(size)))
            else:
                pairs.append((name, "".join(chance.choices(VALUE, k=size))))
    return pairs
