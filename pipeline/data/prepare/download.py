"""Fetches images by their addresses into a cache in the data folder, which a later run uses.

Addresses come from a catalogue, which anybody may have written: only http and https are followed, and no host of a private network
unless the user allows it. The address of the connection itself is checked, so that no redirect and no name server leads around it.
"""

import hashlib
import http.client
import ipaddress
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

from pipeline.core.errors import DATA, UserError
from pipeline.core.files import replacing
from pipeline.core.progress import Steps
from pipeline.data.images import MAX_IMAGE_BYTES

SECONDS_IDLE, SECONDS = 15, 60  # without a byte, and for one image in all
AT_ONCE = 8  # connections
TRIED = 200  # if all of so many first images fail, the rest is not tried
BLOCK = 64 * 1024


class _Private(OSError):
    pass


def _checked(connection: Any) -> None:
    """Raises `_Private` if a connection leads to an address of a private network."""
    peer = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
    if not (peer.ipv4_mapped or peer if isinstance(peer, ipaddress.IPv6Address) else peer).is_global:
        connection.sock.close()
        raise _Private(f"{peer} is an address of a private network")


class _Http(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _checked(self)


class _Https(http.client.HTTPSConnection):
    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)  # before anything is sent, the greeting of TLS included
        _checked(self)
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)  # type: ignore[attr-defined]


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, request)


class Downloads:
    """The cache of images: a file for each address, and the reasons of what failed."""

    def __init__(self, folder: Path, allow_private: bool) -> None:
        self.folder, self.failed = folder, dict[str, str]()
        handlers = () if allow_private else (urllib.request.ProxyHandler({}), _Handler())
        self.opener = urllib.request.build_opener(*handlers)
        self.opener.addheaders = [("User-Agent", "tpad"), ("Accept", "image/*")]

    def path(self, url: str) -> Path:
        """Returns the file of an address."""
        return self.folder / hashlib.sha256(url.encode()).hexdigest()

    def fetch(self, urls: Iterable[str]) -> None:
        """Fetches what is not in the cache. Raises `UserError` (3) if none of the first images can be fetched."""
        every = list(dict.fromkeys(urls))
        wanted = [url for url in every if not self.path(url).exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(AT_ONCE) as pool, Steps("images", len(wanted)) as steps:
            for begin in range(0, len(wanted), TRIED):
                for url, fault in zip(wanted[begin : begin + TRIED], pool.map(self._fetch, wanted[begin : begin + TRIED]), strict=False):
                    if fault:
                        self.failed[url] = fault
                    steps.advance()
                if wanted == every and begin == 0 and len(self.failed) == min(TRIED, len(wanted)):
                    url, fault = next(iter(self.failed.items()))
                    private = "; --allow-private-addresses if these are your own" if "private network" in fault else ""
                    raise UserError(
                        f"no image can be fetched: {fault} ({url[:200]}, {len(self.failed)} tried); check the addresses{private}", DATA
                    )

    def _fetch(self, url: str) -> str:
        """Fetches an image; returns why it failed, or an empty text."""
        try:
            end, size = monotonic() + SECONDS, 0
            with (
                self.opener.open(url, timeout=SECONDS_IDLE) as answer,
                replacing(self.path(url)) as temporary,
                temporary.open("wb") as file,
            ):
                if not answer.url.startswith(("http://", "https://")):
                    raise ValueError("it leads to another kind of address")
                while block := answer.read1(BLOCK):
                    size += len(block)
                    if size > MAX_IMAGE_BYTES:
                        raise ValueError(f"larger than {MAX_IMAGE_BYTES // 2**20} MB")
                    if monotonic() > end:
                        raise TimeoutError(f"slower than {SECONDS} s")
                    file.write(block)
                if not size:
                    raise ValueError("empty")
            return ""
        except (TimeoutError, OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            return f"{reason}"[:200] or type(error).__name__
