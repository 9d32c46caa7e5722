"""A gRPC server without a schema: bytes in, bytes out.  Usage: server.py ADDRESS [TLS_ADDRESS]

The last component of a method's path names its behaviour (BEHAVIOURS); a method that names none
does not exist. The server notes what it saw of each call, which its client names by `call-id`;
`/control/Record` returns that note once the call has ended. The port of TLS_ADDRESS is printed.
"""

import json
import sys
import threading
from concurrent import futures

import grpc

from channel import server_credentials
from shown import BOUND, shown_message, shown_metadata

BIG = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
]
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
            if not self.change.wait_for(lambda: call_id in self.ended, BOUND):
                return {"error": "the server has not seen the end of this call"}
            return vars(self.ended.pop(call_id))

    def when_received(self, call_id, count):
        """Waits until a call in progress has received so many requests."""

        def received():
            return call_id in self.open and len(self.open[call_id].requests) >= count

        with self.change:
            return self.change.wait_for(received, BOUND)


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


def collect(call):
    yield json.dumps([shown_message(request) for request in call.requests()]).encode()


def spread(call):
    for size in json.loads(call.request()):
        yield bytes(range(256)) * (size // 256) + b"x" * (size % 256)


def greet(call):
    """Speaks first."""
    yield b"welcome"
    yield from call.requests()


def fail(call):
    """Ends with the status that the request describes, after so many messages."""
    wanted = json.loads(call.request())
    for number in range(wanted["after"]):
        yield b"%d" % number
    call.end(CODES[wanted["code"]], wanted["details"])


def linger(call):
    """Never ends of itself."""
    for _ in range(int(call.request())):
        yield b"still here"
    call.gone.wait(BOUND)


def enough(call):
    """Ends well after the first request, however many are to come."""
    call.request()
    yield b"enough"


def refuse(call):
    """Ends badly after the first request, however many are to come."""
    call.request()
    call.end(grpc.StatusCode.ALREADY_EXISTS, "enough")
    yield from ()


BEHAVIOURS = {
    "Echo": echo,
    "EchoGzip": echo_gzip,
    "Collect": collect,
    "Spread": spread,
    "Greet": greet,
    "Fail": fail,
    "Linger": linger,
    "Enough": enough,
    "Refuse": refuse,
}


class AnyMethod(grpc.GenericRpcHandler):
    def __init__(self):
        self.records = Records()

    def service(self, handler_call_details):
        method = handler_call_details.method
        if method == "/control/Record":
            return grpc.unary_unary_rpc_method_handler(self.record)
        if method == "/control/Received":
            return grpc.unary_unary_rpc_method_handler(self.received)
        behaviour = BEHAVIOURS.get(method.rsplit("/", 1)[-1])
        if behaviour is None:
            return None
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self.serve(method, behaviour, requests, context)
        )

    def record(self, request, _context):
        return json.dumps(self.records.when_ended(request.decode())).encode()

    def received(self, request, _context):
        return json.dumps(self.records.when_received(*json.loads(request))).encode()

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
    server = grpc.server(futures.ThreadPoolExecutor(512), options=BIG)
    server.add_generic_rpc_handlers((AnyMethod(),))
    if server.add_insecure_port(address) == 0:
        sys.exit(f"cannot listen on {address}")
    for tls_address in tls_addresses:
        print("port", server.add_secure_port(tls_address, server_credentials()), flush=True)
    server.start()
    server.wait_for_termination()


main()
