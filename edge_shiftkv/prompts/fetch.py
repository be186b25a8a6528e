"""Pictures over http(s), from servers that may mean harm."""

from __future__ import annotations

import functools
import http.client
import importlib.metadata
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

MAX_REDIRECTS = 5
TIMEOUT_S = 30.0
"""For everything together, from the look-up of the name to the last byte."""

_PORTS = {"http": 80, "https": 443}
_NAT64, _IPV4_COMPATIBLE = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(url: str, *, max_bytes: int, private: bool = False) -> bytes:
    """Return what is at an http(s) address.

    max_bytes: what is longer is refused.
    private: whether it may be on this machine or in a private network, as may what redirections lead to.

    Connects to the very addresses that were checked, so that a name cannot come to mean another one after the check;
    for the same reason, the environment's proxies are not used. Raises OSError or ValueError with what went wrong, and
    TimeoutError after TIMEOUT_S.
    """
    deadline = time.monotonic() + TIMEOUT_S
    for _ in range(MAX_REDIRECTS + 1):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError("leads to an address that is not http(s)")
        try:
            redirect, data = _get(parts, max_bytes, private, deadline)
        except TimeoutError as error:
            raise TimeoutError(f"not there within {TIMEOUT_S:g} s") from error
        except http.client.HTTPException as error:
            raise ValueError(f"not an answer in HTTP: {type(error).__name__}") from error
        if redirect is None:
            return data
        url = urllib.parse.urljoin(url, redirect)
    raise ValueError(f"more than {MAX_REDIRECTS} redirections")


def is_public(address: Address) -> bool:
    """Whether an address is anyone's, and not in a private network, this machine's or one with a special meaning."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64 or address in _IPV4_COMPATIBLE:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner:
            return is_public(inner)
    return address.is_global and not address.is_multicast


def _get(parts: urllib.parse.SplitResult, max_bytes: int, private: bool, deadline: float) -> tuple[str | None, bytes]:
    """Ask for one address: where it redirects to, or what is there."""
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    plain = _connected(_addresses(host, port, deadline), private, deadline)
    try:
        if parts.scheme == "https":
            plain.settimeout(_left(deadline))
            plain = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _Timed(plain, deadline)
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
        headers = {"User-Agent": _user_agent(), "Accept": "image/*", "Connection": "close"}
        connection.request("GET", f"{path}?{query}" if query else path, headers=headers)
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            return location, b""
        if response.status != 200:
            raise ValueError(f"HTTP status {response.status}")
        data = bytearray()
        while piece := response.read(_PIECE):
            data += piece
            if len(data) > max_bytes:
                raise ValueError(f"more than {max_bytes >> 20} MiB")
        return None, bytes(data)
    finally:
        plain.close()


def _addresses(host: str, port: int, deadline: float) -> Sequence[tuple[Any, ...]]:
    """What `getaddrinfo` says, which has no time limit of its own."""
    answers: queue.SimpleQueue[Sequence[tuple[Any, ...]] | OSError | UnicodeError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise ValueError("no such host") from answer
    return answer


def _connected(addresses: Sequence[tuple[Any, ...]], private: bool, deadline: float) -> socket.socket:
    allowed = [info for info in addresses if private or is_public(ipaddress.ip_address(info[4][0]))]
    if not allowed:
        raise ValueError("leads to this machine or a private network, which takes allow_http='private'")
    for i, (family, kind, protocol, _, address) in enumerate(allowed):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            if i == len(allowed) - 1:
                raise
    raise AssertionError("the last one returns or raises")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Timed:
    """A socket for `http.client` that ends at a deadline; a socket's own time limit is of each read and write alone."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(_left(self._deadline))
        self._connection.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReads(self._connection, self._deadline))

    def close(self) -> None:
        """Later, by whom it was made."""


class _TimedReads(io.RawIOBase):
    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


@functools.cache
def _user_agent() -> str:
    return f"edge-shiftkv/{importlib.metadata.version('edge-shiftkv')}"
