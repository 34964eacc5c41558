"""What the server knows of a client, and of the stream that it has opened.

Both are used by the event loop of the server alone.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from masksl.engine.superlink import wire


class StreamLost(RuntimeError):
    """Raised when a client does not come back; the text says why."""


@dataclass(eq=False)
class Stream:
    """One stream of a client; the newest of them counts.

    Attributes
    ----------
    wake : asyncio.Event
        Set when there is a request to send, or the stream must end.
    task : asyncio.Task | None
        Serves the stream; cancelled when another takes its place.
    """

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)

    def drop(self) -> None:
        """End the stream wherever it is."""
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


@dataclass(eq=False)
class Session:
    """What the server knows of an invited client.

    Attributes
    ----------
    token : str
        Valid until the session ends.
    instance : str
        Names the process of the client; empty before its first stream. No other may
        take its place, because the state of the client is in that process.
    partition : int
        The client's partition; -1 before its first stream.
    stream : Stream | None
        The stream that counts, None while there is none.
    number : int
        Number of the last request.
    request : bytes | None
        The last request as long as it is not answered.
    reply : asyncio.Future[bytes] | None
        Gets the reply to it.
    ending : bool
        Whether the client is told to close its stream.
    timer : asyncio.TimerHandle | None
        Ends the wait for a stream that broke.
    lost : str
        Why the client is lost; empty as long as it is not.
    """

    token: str
    instance: str = ""
    partition: int = -1
    stream: Stream | None = None
    number: int = 0
    request: bytes | None = None
    reply: asyncio.Future[bytes] | None = None
    ending: bool = False
    timer: asyncio.TimerHandle | None = None
    lost: str = ""

    def attach(self, stream: Stream) -> None:
        """Let a stream take the place of the one before."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        older, self.stream = self.stream, stream
        if older is not None:
            older.drop()

    def lose(self, reason: str) -> None:
        """Give the client up."""
        self.lost = self.lost or reason
        self.request = None
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(StreamLost(reason))
        if self.stream is not None:
            self.stream.drop()

    def end(self) -> None:
        """Tell the client to close its stream, once its last request is answered."""
        self.ending = True
        if self.stream is not None:
            self.stream.wake.set()

    async def ask(self, data: bytes) -> bytes:
        """Send a request and return the reply.

        Raises
        ------
        StreamLost
            If the client is lost.
        """
        if self.lost:
            raise StreamLost(self.lost)
        self.request, self.number = data, wire.number_of(data)
        self.reply = asyncio.get_running_loop().create_future()
        if self.stream is not None:
            self.stream.wake.set()
        return await self.reply

    def answer(self, data: bytes) -> None:
        """Accept the reply to the last request; ignore one that came before."""
        if wire.number_of(data) == self.number and self.request is not None:
            self.request = None
            if self.reply is not None and not self.reply.done():
                self.reply.set_result(data)
