"""A gRPC server without a schema: bytes in, bytes out.  Usage: server.py ADDRESS [TLS_ADDRESS]

Listens on ADDRESS, and for TLS on TLS_ADDRESS, and prints the ports: `port N`, `TLS port N`. With
MAX_STREAMS in the environment, it takes no more calls at a time on a connection. A call
whose metadata hold a plan (plan.py) is answered as planned. Of others, the last component of the
method's path names the behaviour (BEHAVIOURS); a method that names none does not exist. The server
notes what it saw of each call, which its client names by `call-id`; `/control/Record` returns that
note once the call has ended.
"""

import json
import os
import sys
import threading
from concurrent import futures

import grpc

import plan
from channel import server_credentials
from shown import BIG, BOUND, shown_message, shown_metadata

CODES = {code.value[0]: code for code in grpc.StatusCode}


class Record:
    """What the server saw of one call."""

    def __init__(self, method, context):
        remaining = context.time_remaining()
        self.method = method
        self.metadata = shown_metadata(context.invocation_metadata())
        self.remaining = remaining if remaining and remaining < 1e6 else None
        self.requests = []
        self.requests_ended = False
        self.client_left = False
        self.released = False


class Records:
    """The records of the calls in progress and of those that have ended, by `call-id`."""

    def __init__(self):
        self.open = {}
        self.ended = {}
        self.change = threading.Condition()

    def begin(self, call_id, record):
        with self.change:
            self.open[call_id] = record

    def note_request(self, record, request):
        with self.change:
            record.requests.append(shown_message(request))
            self.change.notify_all()

    def end(self, call_id):
        with self.change:
            self.ended[call_id] = self.open.pop(call_id)
            self.change.notify_all()

    def when_ended(self, call_id):
        with self.change:
            if not self.change.wait_for(lambda: call_id in self.open | self.ended, BOUND / 6):
                return {"error": "the server has not seen this call"}
            if not self.change.wait_for(lambda: call_id in self.ended, BOUND):
                return {"error": "the server has not seen the end of this call"}
            return vars(self.ended.pop(call_id))

    def when_received(self, call_id, count):
        """Waits until a call in progress has received so many requests."""

        def received():
            return call_id in self.open and len(self.open[call_id].requests) >= count

        with self.change:
            return self.change.wait_for(received, BOUND)

    def release(self, call_id):
        """Lets a call in progress go on that waits for it."""
        with self.change:
            self.open[call_id].released = True
            self.change.notify_all()

    def when_released(self, record):
        with self.change:
            self.change.wait_for(lambda: record.released, BOUND)


class Call:
    """One call: its requests, noted as they are read, and whether its client is still there."""

    def __init__(self, method, requests, context, records):
        self.context = context
        self.records = records
        self.record = Record(method, context)
        self.unread = requests
        self.gone = threading.Event()
        if not context.add_callback(self.gone.set):
            self.gone.set()

    def requests(self):
        try:
            for request in self.unread:
                self.records.note_request(self.record, request)
                yield request
        except Exception:  # grpc raises just that when the client has left
            self.gone.wait(BOUND)
        self.record.requests_ended = True

    def request(self):
        return next(self.requests())

    def end(self, code, details):
        self.context.set_code(code)
        self.context.set_details(details)


def echo(call):
    yield from call.requests()


def echo_gzip(call):
    call.context.set_compression(grpc.Compression.Gzip)
    yield from call.requests()


def echo_deflate(call):
    call.context.set_compression(grpc.Compression.Deflate)
    yield from call.requests()


def echo_some_gzip(call):
    """Compresses every other message."""
    call.context.set_compression(grpc.Compression.Gzip)
    for number, request in enumerate(call.requests()):
        if number % 2:
            call.context.disable_next_message_compression()
        yield request


def collect(call):
    yield json.dumps([shown_message(request) for request in call.requests()]).encode()


def reverse(call):
    """Answers when it has all requests."""
    yield from reversed(list(call.requests()))


def spread(call):
    for size in json.loads(call.request()):
        yield bytes(range(256)) * (size // 256) + b"x" * (size % 256)


def flood(call):
    while not call.gone.is_set():
        yield b"f" * 1_000_000


def greet(call):
    """Speaks first."""
    yield b"welcome"
    yield from call.requests()


def ahead(call):
    """Sends its metadata first."""
    call.context.send_initial_metadata([("ahead", "of all")])
    yield from call.requests()


def ahead_of_release(call):
    """Sends its metadata, and nothing more until it is told to."""
    call.context.send_initial_metadata([("ahead", "of all")])
    call.records.when_released(call.record)
    yield from call.requests()


def end(call):
    """Ends with the status that the request describes, after so many messages."""
    wanted = json.loads(call.request())
    for number in range(wanted["after"]):
        yield b"%d" % number
    call.end(CODES[wanted["code"]], wanted["details"])


def abort(call):
    call.context.abort(grpc.StatusCode.FAILED_PRECONDITION, call.request().decode())
    yield


def crash(call):
    raise ValueError(call.request().decode())
    yield


def cancel(call):
    call.request()
    call.context.cancel()
    call.gone.wait(BOUND)
    yield from ()


def linger(call):
    """Never ends of itself."""
    for _ in range(int(call.request())):
        yield b"still here"
    call.gone.wait(BOUND)


def attend(call):
    """Answers each request, but does not end before its client leaves."""
    yield from call.requests()
    call.gone.wait(BOUND)


def listen(call):
    """Only reads, and does not end before its client leaves."""
    for _ in call.requests():
        pass
    call.gone.wait(BOUND)
    yield from ()


def enough(call):
    """Ends well after the first request, however many are to come."""
    call.request()
    yield b"enough"


def enough_at_once(_call):
    yield b"enough"


def refuse(call):
    """Ends badly after the first request, however many are to come."""
    call.request()
    yield from refuse_at_once(call)


def refuse_at_once(call):
    call.end(grpc.StatusCode.ALREADY_EXISTS, "enough")
    yield from ()


def planned(call):
    """Answers as the call's metadata say."""
    wanted = plan.of(call.context.invocation_metadata())
    if wanted.gzip:
        call.context.set_compression(grpc.Compression.Gzip)
    if wanted.initial:
        call.context.send_initial_metadata(wanted.initial)
    call.context.set_trailing_metadata(wanted.trailing)
    requests = call.requests()
    read = 0
    for after, message in wanted.answers:
        while read < after:
            next(requests)
            read += 1
        yield message
    if wanted.to_the_end:
        for _ in requests:
            pass
    call.end(CODES[wanted.code], wanted.details)


BEHAVIOURS = {
    "Abort": abort,
    "Ahead": ahead,
    "AheadOfRelease": ahead_of_release,
    "Attend": attend,
    "Cancel": cancel,
    "Collect": collect,
    "Echo": echo,
    "EchoDeflate": echo_deflate,
    "EchoGzip": echo_gzip,
    "EchoSomeGzip": echo_some_gzip,
    "End": end,
    "Enough": enough,
    "EnoughAtOnce": enough_at_once,
    "Flood": flood,
    "Greet": greet,
    "Linger": linger,
    "Listen": listen,
    "Raise": crash,
    "Refuse": refuse,
    "RefuseAtOnce": refuse_at_once,
    "Reverse": reverse,
    "Spread": spread,
}


class AnyMethod(grpc.GenericRpcHandler):
    def __init__(self):
        records = Records()
        self.records = records
        self.control = {
            "Record": records.when_ended,
            "Received": records.when_received,
            "Release": records.release,
        }

    def service(self, handler_call_details):
        method = handler_call_details.method
        behaviour = method.rpartition("/")[2]
        if method.startswith("/control/"):
            return grpc.unary_unary_rpc_method_handler(
                lambda request, _context: json.dumps(
                    self.control[behaviour](*json.loads(request))
                ).encode()
            )
        if plan.of(handler_call_details.invocation_metadata) is not None:
            behaviour = planned
        else:
            behaviour = BEHAVIOURS.get(behaviour)
        if behaviour is None:
            return None
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self.serve(method, behaviour, requests, context)
        )

    def serve(self, method, behaviour, requests, context):
        call = Call(method, requests, context, self.records)
        received = context.invocation_metadata()
        call_id = dict(received).get("call-id", call)
        self.records.begin(call_id, call.record)
        chosen = {"initial": [], "trailing": []}
        for key, value in received:
            when, _, name = key.partition("-")
            if when in chosen:
                chosen[when].append((name, value))
        if chosen["initial"]:
            context.send_initial_metadata(chosen["initial"])
        if chosen["trailing"]:
            context.set_trailing_metadata(chosen["trailing"])
        try:
            yield from behaviour(call)
        finally:
            call.record.client_left = call.gone.is_set()
            if call.record.client_left:
                # grpc tells the end of the requests and the loss of the client apart by chance.
                call.record.requests_ended = None
            self.records.end(call_id)


def main():
    address, *tls_addresses = sys.argv[1:]
    limit = os.environ.get("MAX_STREAMS")
    options = BIG + [("grpc.max_concurrent_streams", int(limit))] if limit else BIG
    server = grpc.server(futures.ThreadPoolExecutor(1024), options=options)
    server.add_generic_rpc_handlers((AnyMethod(),))
    port = server.add_insecure_port(address)
    if port == 0:
        sys.exit(f"cannot listen on {address}")
    for tls_address in tls_addresses:
        tls_port = server.add_secure_port(tls_address, server_credentials())
        print(f"TLS port {tls_port}", flush=True)
    server.start()
    print(f"port {port}", flush=True)
    server.wait_for_termination()


main()
