"""The store of an elastic federation: hosted by a process that is none of its ranks, so that any rank may die.

Run as a script, it serves on a socket that it inherits until all ranks are gone. It imports nothing of this package,
to start fast.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from datetime import timedelta

import torch.distributed as dist


def host_store(listener: socket.socket) -> dist.TCPStore:
    """Serve a store in this process, for as long as the returned object lives.

    Clients may connect as soon as the socket listens: they wait until the store serves it.

    Args:
        listener: a listening TCP socket, which the store takes over.
    """
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "localhost",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
        master_listen_fd=listener.detach(),
    )


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening TCP socket.

    Args:
        host: the address on which to listen; empty for all addresses of this machine.
        port: 0 for any that is free.

    Raises:
        OSError: if the port is taken.
    """
    # On all addresses of IPv6 and IPv4, where there is IPv6, as torch itself listens.
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server((host, port), backlog=1024)


def main() -> None:
    """``store_host.py LISTENER PIPE``: two inherited file descriptors. Ends at the pipe's end of file."""
    listener, pipe = (int(argument) for argument in sys.argv[1:])
    # An interrupt from the keyboard reaches this process too, but the ranks that end because of it still need it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = host_store(socket.socket(fileno=listener))
    while os.read(pipe, 1):
        pass
    del store


if __name__ == "__main__":
    main()
