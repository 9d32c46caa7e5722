"""What both sides saw of calls that one channel carried."""

import json

import grpc

from channel import open_channel
from shown import BIG, BOUND, shown_message, shown_metadata


class Transcript:
    """Calls go to TARGET: to server.py, directly or by way of a proxy. SERVER is server.py itself,
    which is asked what it saw."""

    def __init__(self, target, server, options=(), compression=None):
        self.channel = open_channel(target, [*BIG, *options], compression)
        self.control = grpc.insecure_channel(server, BIG)
        self.cases = {}

    def ask(self, what, *arguments):
        """Asks the server something that a proxy has nothing to do with."""
        ask = self.control.unary_unary(f"/control/{what}")
        request = json.dumps(arguments).encode()
        return json.loads(ask(request, timeout=BOUND, wait_for_ready=True))

    def begin(self, name, kind, method, requests, metadata=(), timeout=BOUND, **options):
        """Starts a call. A METHOD without a slash is a behaviour; its service is named after the
        case."""
        if "/" not in method:
            method = f"/some.{name}_Service/{method}"
        metadata = [("call-id", name), *metadata]
        start = getattr(self.channel, kind)(method)
        if kind.startswith("unary"):
            (requests,) = requests
        if kind.endswith("unary"):
            start = start.future
        call = start(requests, metadata=metadata, timeout=timeout, **options)
        call.given = timeout
        return call

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
            seen["server"] = self.ask("Record", name)
            seen["deadline"] = passed_on(call.given, seen["server"].pop("remaining", None))
        self.cases[name] = seen

    def call(self, name, kind, method, requests, server_saw=True, **options):
        """Makes a call from its beginning to its end."""
        call = self.begin(name, kind, method, requests, **options)
        self.end(name, call, read(call, kind), server_saw)


def passed_on(given, remaining):
    """Whether a deadline is the client's, less the time that the call took. The exact time is the
    clock's. C-core rounds up when it sends one, by a hundredth at most."""
    if given is None or remaining is None:
        return given is remaining
    return max(0, given - BOUND) <= remaining <= given * 1.01 + 0.001


def read(call, kind):
    """The messages of a call, up to its end, be it good or bad."""
    messages = []
    try:
        if kind.endswith("unary"):
            messages.append(shown_message(call.result()))
        else:
            messages.extend(map(shown_message, call))
    except grpc.RpcError:
        pass
    return messages
