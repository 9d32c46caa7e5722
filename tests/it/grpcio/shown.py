"""How messages and metadata are written down, so that two calls can be compared as JSON."""

import hashlib

# How long anything may take, in seconds, before it has failed.
BOUND = 60
# Messages of any size, and metadata of any size that somebody might send.
BIG = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]


def shown_message(message):
    if len(message) <= 64:
        return message.decode("latin-1")
    return f"{len(message)} bytes {hashlib.sha256(message).hexdigest()}"


def shown_metadata(metadata):
    """Values by key. Their order matters for one key only; gRPC promises no more."""
    shown = {}
    for key, value in metadata or ():
        if isinstance(value, bytes):
            value = value.hex()
        if len(value) > 512:
            value = shown_message(value.encode())
        shown.setdefault(key, []).append(value)
    return shown
