"""Which interface leads where."""

from __future__ import annotations

import socket

import pytest

from clusterssl.interfaces import address_towards, interface_of, is_loopback, name_is_local


def test_the_loopback_leads_to_itself() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    assert is_loopback("127.0.1.1") and is_loopback("::1") and not is_loopback("10.0.0.1")
    assert address_towards("no-such-host.invalid") == "" and interface_of("192.0.2.1") == ""


def test_ipv6() -> None:
    if address_towards("::1") != "::1":
        pytest.skip("no IPv6 here")
    assert interface_of("::1") == "lo"


@pytest.mark.parametrize(
    ("addresses", "local"), [(["127.0.1.1"], True), (["127.0.0.1", "10.0.0.1"], False), ([], True)]
)
def test_names_that_lead_to_themselves(addresses: list[str], local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*asked: object) -> list[tuple]:
        if not addresses:
            raise OSError("unknown name")
        return [(socket.AF_INET, 1, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert name_is_local() == local
