"""Makes many calls at once, and many connections.  Usage: many.py TARGET

Ends with exit code 0 if each call got its own answers; prints what went wrong otherwise.
"""

import sys
import threading

import grpc

from channel import open_channel
from shown import BOUND

STREAMS = 500
CONNECTIONS = 100
# Streams that are read no further while there is more to come of each than any window holds.
UNREAD = 64


def streams_at_once(channel):
    """All streams are open at the same time: none ends before each has had an answer."""
    answered = [threading.Event() for _ in range(STREAMS)]
    all_answered = threading.Event()

    def talk(number):
        yield b"first %d" % number
        if all_answered.wait(BOUND):
            yield b"last %d" % number

    echo = channel.stream_stream("/many.Streams/Echo")
    calls = [echo(talk(number), timeout=BOUND) for number in range(STREAMS)]
    for number, call in enumerate(calls):
        assert next(call) == b"first %d" % number, number
    all_answered.set()
    for number, call in enumerate(calls):
        assert list(call) == [b"last %d" % number], number
        assert call.code() is grpc.StatusCode.OK, call.code()


def unread_streams(channel):
    """Streams that nobody reads do not stop calls beside them, which are many: time enough for
    each unread stream to fill whatever it may fill."""
    spread = channel.unary_stream("/many.Unread/Spread")
    sizes = b"[" + b",".join([b"1000000"] * 20) + b"]"
    stalled = [spread(sizes, timeout=BOUND) for _ in range(UNREAD)]
    for call in stalled:
        assert len(next(call)) == 1000000
    echo = channel.unary_unary("/many.Beside/Echo")
    for number in range(UNREAD):
        request = b"%d" % number * 300_000
        # Well before the unread streams come to their own deadline, and make room.
        assert echo(request, timeout=BOUND / 3) == request, number
    for call in stalled:
        call.cancel()


def connections(target):
    for number in range(CONNECTIONS):
        options = [("grpc.use_local_subchannel_pool", 1)]
        with open_channel(target, options=options) as channel:
            request = b"connection %d" % number
            echo = channel.unary_unary("/many.Connections/Echo")
            assert echo(request, timeout=BOUND) == request


def main():
    (target,) = sys.argv[1:]
    with open_channel(target) as channel:
        streams_at_once(channel)
        unread_streams(channel)
    connections(target)


main()
