"""Makes calls of every kind and prints what client and server saw.  Usage: calls.py TARGET SERVER

TARGET and SERVER are as in transcript.py. The output is one JSON object: {case: what was seen}.
"""

import itertools
import json
import sys
import threading

import grpc

from shown import BOUND, shown_message
from transcript import Transcript, read

KINDS = ("unary_unary", "stream_unary", "unary_stream", "stream_stream")
METADATA = [
    ("plain", "a value; with, punctuation = %41 ~"),
    ("repeated", "one"),
    ("repeated", "two"),
    ("x.dotted_key-1", "1"),
    ("under_score", "_"),
    ("blob-bin", bytes(range(256))),
    ("blob-bin", b""),
    ("blob-bin", b","),
    ("empty-bin", b""),
    ("user-agent-of-nobody", "x"),
]
ECHOED = [
    *((f"initial-{key}", value) for key, value in METADATA),
    *((f"trailing-{key}", value) for key, value in METADATA),
]
DETAILS = "Größe ✓ 100 % 失敗 \"quoted\"\tand a\nnew line"
STATUS_DETAILS = ("trailing-grpc-status-details-bin", bytes(range(255, -1, -1)) * 8)
MIXED = [b"", b"c" * 100_000, b"short", bytes(range(256)) * 300]


def every_kind(seen):
    for kind in KINDS:
        seen.call(kind, kind, "Echo", iter([b"hello"]), metadata=METADATA + ECHOED)
        seen.call(f"{kind}.empty", kind, "Echo", iter([b""]))
        seen.call(f"{kind}.unknown", kind, "Nothing", iter([b"x"]), server_saw=False)
        seen.call(f"{kind}.ready", kind, "Echo", iter([b"x"]), wait_for_ready=True)
        seen.call(f"{kind}.no_deadline", kind, "Echo", iter([b"x"]), timeout=None)
        for timeout in (25, 3000):
            seen.call(f"{kind}.deadline_{timeout}", kind, "Echo", iter([b"x"]), timeout=timeout)
        seen.call(f"{kind}.deadline", kind, "Linger", iter([b"0"]), timeout=0.5)


def statuses(seen):
    for kind in KINDS:
        for code in range(17):
            # Of unary answers, a good one has a message.
            after = code % 3 if kind.endswith("stream") else int(code == 0)
            wanted = {"code": code, "details": DETAILS, "after": after}
            metadata = [STATUS_DETAILS, *ECHOED[: code % 2]]
            request = json.dumps(wanted).encode()
            seen.call(f"{kind}.ends_{code}", kind, "End", iter([request]), metadata=metadata)
        for behaviour in ("Abort", "Raise", "Cancel"):
            request = iter([b"Gr\xc3\xb6\xc3\x9fe"])
            seen.call(f"{kind}.{behaviour}", kind, behaviour, request, metadata=ECHOED)


def sizes_and_numbers(seen):
    seen.call("no_requests", "stream_unary", "Collect", iter(()))
    seen.call("no_requests_no_responses", "stream_stream", "Echo", iter(()))
    sizes = [0, 1, 5, 16_379, 16_384, 70_000, 300_000]
    seen.call("client_stream", "stream_unary", "Collect", (b"r" * size for size in sizes))
    seen.call("server_stream", "unary_stream", "Spread", [json.dumps(sizes).encode()])
    seen.call("no_responses", "unary_stream", "Spread", [b"[]"])
    many = [b"m%d" % number for number in range(1000)]
    seen.call("many_messages", "stream_stream", "Echo", iter(many))
    huge = bytes(range(256)) * (64 * 4096)
    seen.call("64_MiB", "unary_unary", "Echo", [huge])
    seen.call("64_MiB_in_streams", "stream_stream", "Echo", iter([b"", huge, b""]))


def large_metadata(seen):
    for when in ("just", "initial", "trailing"):
        large = {
            "value": [(f"{when}-large", "v" * 65_536)],
            "blob": [(f"{when}-large-bin", bytes(range(256)) * 192)],
            "number": [(f"{when}-key-{number}", "v" * 50) for number in range(1000)],
        }
        for what, metadata in large.items():
            name = f"large_metadata.{when}.{what}"
            seen.call(name, "unary_unary", "Echo", [b""], metadata=metadata)


def compressed(seen):
    for kind in KINDS:
        requests = MIXED if kind == "stream_stream" else MIXED[1:2]
        for way in ("Gzip", "Deflate"):
            compression = getattr(grpc.Compression, way)
            name, behaviour = f"{kind}.{way}", f"Echo{way}"
            seen.call(name, kind, behaviour, iter(requests), compression=compression)
            seen.call(f"{name}.requests", kind, "Echo", iter(requests), compression=compression)
            seen.call(f"{name}.responses", kind, behaviour, iter(requests))
    seen.call("some_messages.Gzip", "stream_stream", "EchoSomeGzip", iter(MIXED * 2))


def turns(seen):
    """Each message is sent only after the answer to the one before: nothing may be held back."""
    turn = threading.Semaphore(1)
    taken = (b"turn %d" % number for number in range(50) if turn.acquire(timeout=BOUND))
    call = seen.begin("turns", "stream_stream", "Echo", taken)
    messages = []
    for message in call:
        messages.append(shown_message(message))
        turn.release()
    seen.end("turns", call, messages)


def server_first(seen):
    """The server speaks before the client does: a message, or only its metadata."""
    for behaviour in ("Greet", "Ahead"):
        for kind in ("stream_stream", "stream_unary")[: 2 if behaviour == "Ahead" else 1]:
            name = f"{kind}.{behaviour}"
            greeted = threading.Event()
            thanks = (b"thanks" for _ in "x" if greeted.wait(BOUND))
            call = seen.begin(name, kind, behaviour, thanks)
            messages = [shown_message(next(call))] if behaviour == "Greet" else []
            assert call.initial_metadata() is not None
            greeted.set()
            seen.end(name, call, messages + read(call, kind))

    call = seen.begin("unary_stream.Ahead", "unary_stream", "AheadOfRelease", [b"x"])
    assert call.initial_metadata() is not None
    seen.ask("Release", "unary_stream.Ahead")
    seen.end("unary_stream.Ahead", call, read(call, "unary_stream"))


def half_closed(seen):
    """One side has ended and the other goes on."""
    many = [b"%d" % number * (number % 500) for number in range(2000)]
    seen.call("client_ends_first", "stream_stream", "Reverse", iter(many))
    seen.call("client_ends_at_once", "unary_stream", "Spread", [json.dumps([500] * 3000).encode()])

    for kind in ("stream_unary", "stream_stream"):
        for behaviour in ("Enough", "Refuse", "EnoughAtOnce", "RefuseAtOnce", "Nothing"):
            known = behaviour != "Nothing"
            # Endless requests, small and large; one, and then an open end; an open end.
            sending = {
                "small": lambda over: (b"s" for _ in iter(over.is_set, True)),
                "large": lambda over: (b"s" * 100_000 for _ in iter(over.is_set, True)),
                "open": lambda over: itertools.chain([b"x"], (b"" for _ in "x" if not over.wait(BOUND))),
                "silent": lambda over: (b"" for _ in "x" if not over.wait(BOUND)),
            }
            if behaviour in ("Enough", "Refuse"):
                del sending["silent"]
            for how, requests in sending.items():
                name = f"{kind}.{behaviour}.{how}"
                over = threading.Event()
                call = seen.begin(name, kind, behaviour, requests(over))
                messages = read(call, kind)
                over.set()
                seen.end(name, call, messages, server_saw=known)


def cancelled(seen):
    """The client cancels, at various points."""

    def cancel(name, kind, behaviour, requests, answers, received=0):
        name = f"cancel.{name}"
        call = seen.begin(name, kind, behaviour, requests)
        messages = [shown_message(next(call)) for _ in range(answers)]
        if received:
            messages.append(f"received: {seen.ask('Received', name, received)}")
        call.cancel()
        seen.end(name, call, messages)

    def and_an_open_end(*requests):
        return itertools.chain(requests, (b"" for _ in "x" if not over.wait(BOUND)))

    over = threading.Event()
    cancel("unary", "unary_unary", "Linger", [b"0"], 0, received=1)
    cancel("after_a_request", "stream_stream", "Listen", and_an_open_end(b"a"), 0, received=1)
    cancel("server_stream", "unary_stream", "Linger", [b"2"], 2)
    cancel("flood", "unary_stream", "Flood", [b""], 2)
    cancel("client_stream", "stream_unary", "Listen", and_an_open_end(b"a", b"b"), 0, received=2)
    cancel("after_last_request", "stream_stream", "Linger", iter([b"1"]), 1)
    cancel("between_requests", "stream_stream", "Attend", and_an_open_end(b"a", b"b"), 2)
    over.set()


def odd_channel(target, server):
    """A channel that compresses all it sends, and names itself."""
    options = [
        ("grpc.primary_user_agent", "conformance/1.0 (a; b)"),
        ("grpc.secondary_user_agent", "~second/2"),
    ]
    seen = Transcript(target, server, options, grpc.Compression.Deflate)
    for kind in KINDS:
        requests = MIXED if kind == "stream_stream" else MIXED[1:2]
        seen.call(f"{kind}.odd_channel", kind, "Echo", iter(requests))
    return seen.cases


def main():
    target, server = sys.argv[1:]
    seen = Transcript(target, server)
    for cases in (
        every_kind,
        statuses,
        sizes_and_numbers,
        large_metadata,
        compressed,
        turns,
        server_first,
        half_closed,
        cancelled,
    ):
        cases(seen)
    json.dump(seen.cases | odd_channel(target, server), sys.stdout, ensure_ascii=False)


main()
