"""Bounds what one connection can cost, which uvicorn's fast parser does not: the head of a request, what is around its body, silence.

The limits of a body and of concurrency are in `middleware.py`.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 65_536  # bytes of a request line and its headers; also of chunk lines and trailers, beyond `FRAME` for each byte of body
FRAME = 1  # so that a body does not come in millions of chunks
PIECE = 8192  # bytes that are parsed before others have their turn ...
MAX_PIPELINE = 16  # ... and requests of a connection that may wait for the answers to earlier ones
HEAD_SECONDS = 10.0  # from the first byte of a head to its last
IDLE_SECONDS = 30.0  # from the connection to its first byte
UNREAD_SECONDS = 30.0  # in which a client may read nothing of an answer that is larger than the buffers of its connection


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol of one connection, which refuses heads of more than `MAX_HEAD` bytes (431) or `HEAD_SECONDS` (408)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head, self._head_bytes, self._frame_bytes = True, 0, 0
        self._late: asyncio.TimerHandle | None = self.loop.call_later(IDLE_SECONDS, transport.close)
        self._silent = True
        self._unread: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self._silent:
            self._silent = False
            self._stop_clock()
        while data and not self.transport.is_closing():
            piece, data = data[:PIECE], data[PIECE:]
            if len(self.pipeline) > MAX_PIPELINE:
                self._refuse("429 Too Many Requests")
                return
            if self._in_head:
                if self._head_bytes == MAX_HEAD:
                    self._refuse("431 Request Header Fields Too Large")
                    return
                if self._late is None:
                    self._late = self.loop.call_later(HEAD_SECONDS, self._refuse, "408 Request Timeout")
                room = MAX_HEAD - self._head_bytes
                piece, data = piece[:room], piece[room:] + data
                self._head_bytes += len(piece)
            else:
                self._frame_bytes += len(piece)
                if self._frame_bytes > MAX_HEAD + len(piece):  # of earlier pieces: a chunk line or a trailer without end
                    self._refuse("431 Request Header Fields Too Large")
                    return
            super().data_received(piece)

    def on_body(self, body: bytes) -> None:
        self._frame_bytes -= (1 + FRAME) * len(body)
        super().on_body(body)

    def _refuse(self, status: str) -> None:
        self.transport.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode("ascii"))
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._in_head, self._frame_bytes = False, 0
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)
        if self._unread is not None:
            self._unread.cancel()

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
