"""Makes calls of every kind and prints what client and server saw.  Usage: calls.py TARGET SERVER

TARGET is where the calls go: to server.py, directly or by way of a proxy. SERVER is server.py
itself, which is asked what it saw. The output is one JSON object: {case: what was seen}.
"""

import itertools
import json
import sys
import threading

import grpc

from channel import open_channel
from shown import BOUND, shown_message, shown_metadata

BIG = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]
METADATA = [
    ("plain", "a value; with, punctuation = %41 ~"),
    ("repeated", "one"),
    ("repeated", "two"),
    ("x.dotted_key-1", "1"),
    ("blob-bin", bytes(range(256))),
    ("blob-bin", b""),
    ("user-agent-of-nobody", "x"),
]
ECHOED = [
    *((f"initial-{key}", value) for key, value in METADATA),
    *((f"trailing-{key}", value) for key, value in METADATA),
]
DETAILS = "Größe ✓ 100 % 失敗 \"quoted\"\tand a\nnew line"
STATUS_DETAILS = ("trailing-grpc-status-details-bin", bytes(range(255, -1, -1)) * 8)


class Transcript:
    def __init__(self, target, server):
        self.channel = open_channel(target, options=BIG)
        control = grpc.insecure_channel(server, options=BIG)
        self.record = control.unary_unary("/control/Record")
        self.received = control.unary_unary("/control/Received")
        self.cases = {}

    def begin(self, name, kind, behaviour, requests, metadata=(), timeout=BOUND, **options):
        """Starts a call, whose service is named after the case."""
        method = f"/some.{name}_Service/{behaviour}"
        metadata = [("call-id", name), *metadata]
        start = getattr(self.channel, kind)(method)
        if kind.startswith("unary"):
            (requests,) = requests
        if kind.endswith("unary"):
            start = start.future
        return start(requests, metadata=metadata, timeout=timeout, **options)

    def end(self, name, call, messages, server_saw=True):
        """Writes down how a call ended, on both sides."""
        seen = {
            "initial": shown_metadata(call.initial_metadata()),
            "messages": messages,
            "code": str(call.code()),
            "details": call.details(),
            "trailing": shown_metadata(call.trailing_metadata()),
        }
        if server_saw:
            seen["server"] = json.loads(self.record(name.encode(), timeout=BOUND))
            # Exact time is the clock's; that there is a deadline, and which, is the call's.
            remaining = seen["server"].pop("remaining", None)
            seen["deadline"] = remaining if remaining is None else 0 <= remaining <= BOUND + 1
        self.cases[name] = seen

    def call(self, name, kind, behaviour, requests, server_saw=True, **options):
        call = self.begin(name, kind, behaviour, requests, **options)
        messages = []
        try:
            if kind.endswith("unary"):
                messages.append(shown_message(call.result()))
            else:
                messages.extend(map(shown_message, call))
        except grpc.RpcError:
            pass
        self.end(name, call, messages, server_saw)


def all_calls(seen):
    kinds = ("unary_unary", "stream_unary", "unary_stream", "stream_stream")
    for kind in kinds:
        seen.call(kind, kind, "Echo", iter([b"hello"]), metadata=METADATA + ECHOED)
        seen.call(f"{kind}.no_deadline", kind, "Echo", iter([b"hello"]), timeout=None)
        seen.call(f"{kind}.unknown", kind, "Nothing", iter([b"x"]), server_saw=False)
        seen.call(f"{kind}.empty", kind, "Echo", iter([b""]))
        seen.call(f"{kind}.gzip", kind, "EchoGzip", iter([b"z" * 100_000]), compression=grpc.Compression.Gzip)
        seen.call(f"{kind}.deadline", kind, "Linger", iter([b"0"]), timeout=0.3)
        for code in range(1, 17):
            after = code % 3 if kind.endswith("stream") else 0
            wanted = {"code": code, "details": DETAILS, "after": after}
            metadata = [STATUS_DETAILS, *ECHOED[: code % 2]]
            request = json.dumps(wanted).encode()
            seen.call(f"{kind}.fails_{code}", kind, "Fail", iter([request]), metadata=metadata)

    seen.call("no_requests", "stream_unary", "Collect", iter(()))
    sizes = [0, 1, 5, 16_379, 16_384, 70_000, 300_000]
    seen.call("client_stream", "stream_unary", "Collect", (b"r" * size for size in sizes))
    seen.call("server_stream", "unary_stream", "Spread", [json.dumps(sizes).encode()])
    seen.call("no_responses", "unary_stream", "Spread", [b"[]"])
    many = [b"m%d" % number for number in range(1000)]
    seen.call("many_messages", "stream_stream", "Echo", iter(many))
    seen.call("huge_unary", "unary_unary", "Echo", [bytes(range(256)) * (20 * 4096)])
    seen.call("huge_metadata", "unary_unary", "Echo", [b""], metadata=[("initial-big", "h" * 40_000)])

    # Each message is sent only after the answer to the one before: nothing may be held back.
    turn = threading.Semaphore(1)
    taken = (b"turn %d" % number for number in range(20) if turn.acquire(timeout=BOUND))
    call = seen.begin("turns", "stream_stream", "Echo", taken)
    messages = []
    for message in call:
        messages.append(shown_message(message))
        turn.release()
    seen.end("turns", call, messages)

    # The server speaks before the client does.
    greeted = threading.Event()
    call = seen.begin(
        "server_first", "stream_stream", "Greet", (b"thanks" for _ in "x" if greeted.wait(BOUND))
    )
    messages = [shown_message(next(call))]
    greeted.set()
    messages.extend(map(shown_message, call))
    seen.end("server_first", call, messages)

    for behaviour in ("Enough", "Refuse"):
        for size in (1, 100_000):
            name = f"{behaviour}.while_sending_{size}"
            over = threading.Event()
            sent = (b"s" * size for _ in iter(over.is_set, True))
            call = seen.begin(name, "stream_unary", behaviour, sent)
            try:
                messages = [shown_message(call.result())]
            except grpc.RpcError:
                messages = []
            over.set()
            seen.end(name, call, messages)

    cancelled(seen)


def cancelled(seen):
    """The client cancels, at various points."""
    call = seen.begin("cancel.server_stream", "unary_stream", "Linger", [b"2"])
    messages = [shown_message(next(call)), shown_message(next(call))]
    call.cancel()
    seen.end("cancel.server_stream", call, messages)

    over = threading.Event()
    sent = itertools.chain([b"a", b"b"], (b"" for _ in "x" if not over.wait(BOUND)))
    call = seen.begin("cancel.client_stream", "stream_unary", "Collect", sent)
    received = seen.received(b'["cancel.client_stream", 2]', timeout=BOUND)
    call.cancel()
    seen.end("cancel.client_stream", call, [f"received: {received.decode()}"])
    over.set()

    call = seen.begin("cancel.after_last_request", "stream_stream", "Linger", iter([b"1"]))
    messages = [shown_message(next(call))]
    call.cancel()
    seen.end("cancel.after_last_request", call, messages)


def main():
    target, server = sys.argv[1:]
    seen = Transcript(target, server)
    all_calls(seen)
    json.dump(seen.cases, sys.stdout, ensure_ascii=False)


main()
