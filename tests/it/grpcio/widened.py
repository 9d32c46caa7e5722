"""A proxy that does what `primed serve --compat bazel` does, and is not primed: it forwards every
call, and makes the oldest version in the answer of GetCapabilities 2.0.

Usage: widened.py ADDRESS UPSTREAM
"""

import sys
from concurrent import futures

import grpc

BIG = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
# Of ServerCapabilities, low_api_version { minor: 0 }; what comes last counts.
WIDENED = {"/build.bazel.remote.execution.v2.Capabilities/GetCapabilities": b"\x22\x02\x10\x00"}


class Forward(grpc.GenericRpcHandler):
    def __init__(self, channel):
        self.channel = channel

    def service(self, handler_call_details):
        method = handler_call_details.method
        forward = self.channel.stream_stream(method)

        def serve(requests, context):
            metadata = [pair for pair in context.invocation_metadata() if pair[0] != "user-agent"]
            remaining = context.time_remaining()  # where there is no deadline, a number without end
            timeout = remaining if remaining and remaining < 1e6 else None
            call = forward(requests, timeout=timeout, metadata=metadata)
            if not context.add_callback(call.cancel):
                call.cancel()
            try:
                for response in call:
                    yield response + WIDENED.get(method, b"")
            except grpc.RpcError as error:
                context.set_trailing_metadata(error.trailing_metadata())
                context.abort(error.code(), error.details())

        return grpc.stream_stream_rpc_method_handler(serve)


def main():
    address, upstream = sys.argv[1:]
    server = grpc.server(futures.ThreadPoolExecutor(64), options=BIG)
    server.add_generic_rpc_handlers((Forward(grpc.insecure_channel(upstream, options=BIG)),))
    if server.add_insecure_port(address) == 0:
        sys.exit(f"cannot listen on {address}")
    server.start()
    server.wait_for_termination()


main()
