"""Makes calls that last, each by a connection of its own, and ends them when all are answered.
Usage: crowd.py TARGET COUNT [METADATA]

METADATA is how many bytes of it each of them has. Prints the codes with which they ended: {CODE: COUNT}.
"""

import collections
import json
import sys
import threading

import grpc

from channel import open_channel
from shown import BOUND

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def main():
    target, count, *size = sys.argv[1:]
    metadata = [("x-long", "x" * int(size[0]))] if size else []
    answered = threading.Event()

    def requests():
        answered.wait(BOUND)
        yield from ()

    channels = [open_channel(target, OWN_CONNECTION) for _ in range(int(count))]
    methods = [channel.stream_stream("/some.Service/Greet") for channel in channels]
    calls = [method(requests(), timeout=BOUND, metadata=metadata) for method in methods]
    codes = collections.Counter()
    for call in calls:
        try:
            next(call)
        except grpc.RpcError as error:
            print(error, file=sys.stderr)
    answered.set()
    for call in calls:
        codes[call.code().name] += 1
    print(json.dumps(codes))


main()
