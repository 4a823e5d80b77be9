"""Which network interface leads to the other nodes, for hosts whose own name leads to themselves only.

Debian's installer writes "127.0.1.1 name" into /etc/hosts; gloo then tells the other nodes to connect to 127.0.1.1.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915


def name_is_local() -> bool:
    """Whether this host's name stands for addresses of the loopback only, or for none."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return True
    return all(is_loopback(str(info[4][0])) for info in found)


def is_loopback(address: str) -> bool:
    """Whether an address does not leave this host."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def address_towards(host: str) -> str:
    """Address from which this host would talk to another; empty where there is no way. Nothing is sent."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as way:
                way.connect(address)
                return str(way.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """Name of the interface that has an address; empty if none has."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if number.version == 6:
        table = Path("/proc/net/if_inet6")
        rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
        return next((row[-1] for row in rows if int(row[0], 16) == int(number)), "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # interfaces without an IPv4 address
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if answer[20:24] == number.packed:
                    return name
    return ""
