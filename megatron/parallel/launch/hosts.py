"""Names of hosts: whether they resolve to addresses. torch would try for many minutes, and not say which did not."""

import os
import socket
import sys
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from ipaddress import ip_address

from megatron.errors import LaunchError

LOOPBACK = "127.0.0.1"
LOOKUP_S = 30  # a resolver whose servers do not answer may take minutes


def check_address(address: str) -> None:
    """Raises LaunchError where rank 0's host cannot be found by this address."""
    if not addresses_of(address):
        raise LaunchError(f"MASTER_ADDR is {address!r}, and {socket.gethostname()} knows no host of that name; give "
                          f"rank 0's host by a name that resolves, or by its IP address (on one host: {LOOPBACK})")


def choose_interface(is_on_one_host: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sees to it that gloo has an address; left alone, it looks for one by this host's own name.

    On one host that is the loopback interface. Raises LaunchError where there are others and the name does not serve.
    """
    if "GLOO_SOCKET_IFNAME" in environment:
        return
    if is_on_one_host:
        environment["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    elif all(map(is_loopback, addresses_of(socket.gethostname()))):
        raise LaunchError(f"{socket.gethostname()} finds no address for other hosts by its own name; set "
                          "GLOO_SOCKET_IFNAME to the network interface that leads to them, or mend /etc/hosts")


def is_loopback(address: str) -> bool:
    """Whether an address, or a name that always means one, is this host itself."""
    try:
        return ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def addresses_of(name: str) -> set[str]:
    """The IP addresses of a host; empty where its name does not resolve in half a minute."""
    found = set[str]()

    def look_up() -> None:
        with suppress(OSError, UnicodeError):  # unknown; no name at all, such as a..b
            found.update(str(info[4][0]) for info in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOKUP_S)
    return set(found)
