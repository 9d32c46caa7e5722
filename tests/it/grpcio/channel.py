"""How the scripts connect, and listen: with TLS where the environment names its files.

A client verifies by TLS_CA and shows TLS_CERT and TLS_KEY, if they are set. A server shows
TLS_CERT and TLS_KEY; with TLS_CLIENT_CA it wants to see a certificate too.
"""

import os
import pathlib

import grpc


def content(variable):
    path = os.environ.get(variable)
    return pathlib.Path(path).read_bytes() if path else None


def open_channel(target, options=None, compression=None):
    if "TLS_CA" not in os.environ:
        return grpc.insecure_channel(target, options, compression)
    credentials = grpc.ssl_channel_credentials(content("TLS_CA"), content("TLS_KEY"), content("TLS_CERT"))
    return grpc.secure_channel(target, credentials, options, compression)


def server_credentials():
    client_ca = content("TLS_CLIENT_CA")
    pairs = [(content("TLS_KEY"), content("TLS_CERT"))]
    return grpc.ssl_server_credentials(pairs, client_ca, require_client_auth=client_ca is not None)
