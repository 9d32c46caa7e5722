"""How messages and metadata are written down, so that two calls can be compared as JSON."""

import hashlib

# How long anything may take, in seconds, before it has failed.
BOUND = 60


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
