"""Starts a program as systemd does, with sockets.  Usage: passed.py NAME=SOCKET… -- PROGRAM…

SOCKET is the path of a Unix socket, or `tcp`, or `udp`, or `connected` for one that is not
listening. What became of `tcp` is printed: its port.
"""

import os
import socket
import sys


def bound(wanted):
    if wanted == "udp":
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if wanted == "connected":
        return socket.socketpair()[0]
    if wanted == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        return listener
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(wanted)
    listener.listen()
    return listener


def main():
    divider = sys.argv.index("--")
    named = [argument.split("=", 1) for argument in sys.argv[1:divider]]
    program = sys.argv[divider + 1 :]
    sockets = [bound(wanted) for _, wanted in named]
    # Out of the way first: they may stand where others are to go.
    high = [os.dup2(each.fileno(), 100 + index) for index, each in enumerate(sockets)]
    for index, descriptor in enumerate(high):
        os.dup2(descriptor, 3 + index)
        os.close(descriptor)
    if not named:
        os.execv(program[0], program)
    os.environ["LISTEN_FDS"] = str(len(sockets))
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.environ["LISTEN_FDNAMES"] = ":".join(name for name, _ in named)
    os.execv(program[0], program)


main()
