"""Makes random calls and prints what client and server saw.

Usage: random_calls.py TARGET SERVER SEED COUNT

TARGET and SERVER are as in transcript.py. The same SEED makes the same calls. Several are in
progress at once. The output is one JSON object: {call: what was seen}.
"""

import json
import sys
from concurrent import futures

import grpc

from plan import Sent
from transcript import Transcript

AT_ONCE = 8
# So many calls that do not reach the server are enough to know.
LOST = 3


def main():
    target, server, seed, count = sys.argv[1:]
    seen = Transcript(target, server)

    def make(number):
        if sum("error" in case.get("server", ()) for case in list(seen.cases.values())) >= LOST:
            return
        sent = Sent(seed, number)
        compression = None if sent.compression is None else grpc.Compression(sent.compression)
        seen.call(
            sent.name,
            sent.kind,
            sent.method,
            iter(sent.requests),
            metadata=sent.metadata,
            timeout=sent.timeout,
            compression=compression,
        )
        seen.cases[sent.name]["sent"] = {"method": sent.method, "kind": sent.kind}

    with futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for made in [pool.submit(make, number) for number in range(int(count))]:
            made.result()
    json.dump(seen.cases, sys.stdout, ensure_ascii=False)


main()
