"""Bounds the head of a request, which uvicorn's fast parser reads without a limit of size or time."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 65_536  # bytes of a request line and its headers
HEAD_SECONDS = 10.0  # from the first byte of a head to its last


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol of one connection, which refuses heads of more than `MAX_HEAD` bytes (431) or `HEAD_SECONDS` (408)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head, self._head_bytes = True, 0
        self._late: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            piece, data = data, b""
            if self._in_head:
                if self._head_bytes == MAX_HEAD:
                    self._refuse("431 Request Header Fields Too Large")
                    return
                if self._late is None:
                    self._late = self.loop.call_later(HEAD_SECONDS, self._refuse, "408 Request Timeout")
                room = MAX_HEAD - self._head_bytes
                piece, data = piece[:room], piece[room:]
                self._head_bytes += len(piece)
            super().data_received(piece)

    def _refuse(self, status: str) -> None:
        self.transport.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode("ascii"))
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
