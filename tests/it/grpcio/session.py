"""Makes one call after another on one channel, as told on stdin.  Usage: session.py TARGET

A line of stdin is a call: {"method": PATH, "requests": [HEX, …], "hold": BOOL, "timeout": SECONDS,
"metadata": [[KEY, VALUE], …]}, all but the first two optional. With `hold` its requests do not end
before the line `release`. Lines of stdout, as things happen:
{"message": HEX}, then {"code": …, "details": …, "initial": …, "trailing": …, "connected": N},
where N counts how often the channel has become ready.
"""

import json
import queue
import sys
import threading

import grpc

from shown import BOUND, shown_metadata


def say(**line):
    print(json.dumps(line), flush=True)


class Readiness:
    def __init__(self, channel):
        self.times = 0
        self.change = threading.Condition()
        channel.subscribe(self.see)

    def see(self, state):
        with self.change:
            if state is grpc.ChannelConnectivity.READY:
                self.times += 1
                self.change.notify_all()

    def count(self):
        """Callbacks come late: the first one is waited for."""
        with self.change:
            self.change.wait_for(lambda: self.times > 0, BOUND)
            return self.times


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
    channel = grpc.insecure_channel(target)
    readiness = Readiness(channel)
    calls = queue.Queue()
    threading.Thread(target=read, args=(calls,), daemon=True).start()
    while (call := calls.get()) is not None:
        wanted, release = call
        call = channel.stream_stream(wanted["method"])(
            requests(wanted, release),
            timeout=wanted.get("timeout", BOUND),
            metadata=[tuple(pair) for pair in wanted.get("metadata", [])],
        )
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
            connected=readiness.count(),
        )


main()
