"""Checks that host names resolve, and ports answer: torch would retry for minutes, and not say which name is wrong."""

import os
import socket
import sys
import threading
import time
from collections.abc import MutableMapping
from contextlib import suppress
from ipaddress import ip_address

from megatron.errors import LaunchError

LOOPBACK = "127.0.0.1"
LOOKUP_S = 30  # a resolver whose servers do not answer may take minutes


def check_address(address: str) -> None:
    """Raises LaunchError if the address of rank 0's host does not resolve."""
    if not addresses_of(address):
        raise LaunchError(f"MASTER_ADDR is {address!r}, and {socket.gethostname()} knows no host of that name; give "
                          f"rank 0's host by a name that resolves, or by its IP address (on one host: {LOOPBACK})")


def choose_interface(is_on_one_host: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes sure that gloo finds an address for this host; by default it resolves the host's own name.

    On one host it sets the loopback interface. With several hosts it raises LaunchError if that name does not resolve
    to an address that other hosts can reach.
    """
    if "GLOO_SOCKET_IFNAME" in environment:
        return
    if is_on_one_host:
        environment["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    elif all(map(is_loopback, addresses_of(socket.gethostname()))):
        raise LaunchError(f"{socket.gethostname()} finds no address for other hosts by its own name; set "
                          "GLOO_SOCKET_IFNAME to the network interface that leads to them, or mend /etc/hosts")


def is_loopback(address: str) -> bool:
    """Whether an address is a loopback address, or the name localhost."""
    try:
        return ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def is_own(address: str) -> bool:
    """Whether a name or an address is one of this host."""
    for number in addresses_of(address):
        family = socket.AF_INET6 if ":" in number else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as test:
            test.bind((number, 0))
            return True
    return False


def answers(address: str, port: int, within_s: float) -> bool:
    """Whether something listens at that port, now or within that many seconds; it looks ten times a second."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        with suppress(OSError), socket.create_connection((address, port), timeout=1):
            return True
        time.sleep(0.1)
    return False


def addresses_of(name: str) -> set[str]:
    """The IP addresses of a host; empty if its name does not resolve within LOOKUP_S seconds."""
    found = set[str]()

    def look_up() -> None:
        with suppress(OSError, UnicodeError):  # unknown; no name at all, such as a..b
            found.update(str(info[4][0]) for info in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOKUP_S)
    return set(found)
