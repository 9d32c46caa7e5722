"""Makes one call after another on one channel, as told on stdin.  Usage: session.py TARGET

A line of stdin is a call: {"method": PATH, "requests": [HEX, …]} with these to choose from: "hold":
BOOL, "hasty": BOOL, "wait": BOOL, "timeout": SECONDS, "metadata": [[KEY, VALUE], …], "gzip": BOOL.
With `hold` its requests do not end before the line `release`; with `gzip` its messages are
compressed; with `wait` it waits for a server, and {"state": "TRANSIENT_FAILURE"} is said when there
was none. Lines of stdout, as things happen:
{"message": HEX}, then {"code": …, "details": …, "initial": …, "trailing": …, "connected": N},
where N counts how often the channel has become ready; with `hasty` its first time is not waited for,
which may never come.
"""

import json
import queue
import sys
import threading

import grpc

from channel import open_channel
from shown import BOUND, shown_metadata


def say(**line):
    print(json.dumps(line), flush=True)


class Readiness:
    def __init__(self, channel):
        self.times = 0
        self.failed = False
        self.change = threading.Condition()
        channel.subscribe(self.see)

    def see(self, state):
        with self.change:
            self.times += state is grpc.ChannelConnectivity.READY
            self.failed |= state is grpc.ChannelConnectivity.TRANSIENT_FAILURE
            self.change.notify_all()

    def count(self, hasty):
        """Callbacks come late: the first one is waited for."""
        with self.change:
            self.change.wait_for(lambda: hasty or self.times > 0, BOUND)
            return self.times

    def until_failed(self):
        with self.change:
            self.change.wait_for(lambda: self.failed, BOUND)


def read(calls):
    release = None
    for line in sys.stdin:
        if line.strip() == "release":
            release.set()
        else:
            release = threading.Event()
            calls.put((json.loads(line), release))
    calls.put(None)


def requests(wanted, release):
    for request in wanted["requests"]:
        yield bytes.fromhex(request)
    if wanted.get("hold"):
        release.wait(BOUND)


def main():
    (target,) = sys.argv[1:]
    channel = open_channel(target)
    readiness = Readiness(channel)
    calls = queue.Queue()
    threading.Thread(target=read, args=(calls,), daemon=True).start()
    while (call := calls.get()) is not None:
        wanted, release = call
        options = {
            "timeout": wanted.get("timeout", BOUND),
            "metadata": [tuple(pair) for pair in wanted.get("metadata", ())],
            "wait_for_ready": wanted.get("wait"),
        }
        if wanted.get("gzip"):
            options["compression"] = grpc.Compression.Gzip
        call = channel.stream_stream(wanted["method"])(requests(wanted, release), **options)
        if wanted.get("wait"):
            readiness.until_failed()
            say(state="TRANSIENT_FAILURE")
        try:
            for message in call:
                say(message=message.hex())
        except grpc.RpcError:
            pass
        release.set()
        say(
            code=call.code().name,
            details=call.details(),
            initial=shown_metadata(call.initial_metadata()),
            trailing=shown_metadata(call.trailing_metadata()),
            connected=readiness.count(wanted.get("hasty", False)),
        )


main()
