"""Payloads at the cut, as the server sees them: activations and gradients."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, RecordDict

from masksl.compress import FrameError, decode, kept_positions
from masksl.dataset import DATASETS
from masksl.methods.split.messages import ACTIVATION, labels_of
from masksl.runtime import messages
from masksl.runtime.compressors import EXACT, compressor_of
from masksl.runtime.messages import ends_run
from masksl.runtime.round import Round
from masksl.settings import Settings, ThreadsConfig, read

T = TypeVar("T")


class Payloads:
    """Decodes activations and encodes gradients, several frames at a time.

    Each of ``threads.server`` threads works on a frame of its own.

    Every method raises `RunError` with round, step, client and compressor if a frame is
    broken or values are not finite.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    activation_shape : tuple[int, ...]
        Shape of a sample's activation.
    device : torch.device
        Device of the server half.

    Attributes
    ----------
    compressor, gradient_compressor : str
        Slot and name of the compressors in words, for error lines.
    """

    def __init__(
        self,
        settings: Settings,
        activation_shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.compressor = f"compressor {settings['compressor.name']}"
        name = settings["gradient_compressor.name"]
        self.gradient_compressor = f"gradient_compressor {name}"
        self._at_kept = settings["gradient_positions"] == "kept"
        self._encoder = compressor_of(settings, "gradient_compressor")
        self._shape = torch.Size(activation_shape)
        self._classes = DATASETS[str(settings["dataset.name"])].classes
        self._device = device
        self._threads = read(ThreadsConfig, settings, "threads").server
        self._pool = ThreadPoolExecutor(self._threads, "codec", initializer=_alone)

    @property
    def changes_gradients(self) -> bool:
        """Whether gradients are not sent as they are."""
        return self._encoder != EXACT or self._at_kept

    def decode(
        self, round_: Round, replies: Mapping[int, RecordDict], step: int, most: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Decode the activations and the labels of replies.

        Parameters
        ----------
        round_ : Round
            The current round.
        replies : Mapping[int, RecordDict]
            Contents of replies by the number of the client.
        step : int
            Step within the round.
        most : int
            Samples of a reply at most.

        Yields
        ------
        tuple[torch.Tensor, torch.Tensor]
            Of each reply, in their order: float32, shape (n, ...), and int64, shape
            (n,), on the device of the half.
        """

        def decoded(client: int) -> tuple[torch.Tensor, torch.Tensor]:
            with ends_run(round_.place(step, client, self.compressor)):
                return self._decoded(replies[client], most)

        return self._each(round_, decoded, replies)

    def _decoded(
        self, content: RecordDict, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the activation and the labels of a reply."""
        frame = messages.frame_of(content, ACTIVATION)
        count = most * self._shape.numel()
        activation = decode(frame, device=self._device, max_elements=count)
        if activation.shape[1:] != self._shape or activation.dtype != torch.float32:
            sizes = ", ".join(map(str, self._shape))
            raise FrameError(
                f"activation of shape {tuple(activation.shape)}, "
                f"{activation.dtype}, expected (n, {sizes}), float32"
            )
        labels = labels_of(content, self._classes, len(activation))
        return activation, labels.to(self._device)

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def at_kept(
        self,
        round_: Round,
        client: int,
        gradient: torch.Tensor,
        reply: RecordDict,
        step: int,
    ) -> torch.Tensor:
        """Return a gradient, shape (k,), at the positions kept by its activation."""
        with ends_run(round_.place(step, client, self.compressor)):
            frame = messages.frame_of(reply, ACTIVATION)
            count = gradient.numel()
            positions = kept_positions(
                frame, device=gradient.device, max_elements=count
            )
        return gradient.flatten()[positions]

    def encode_gradients(
        self, round_: Round, gradients: Mapping[int, torch.Tensor], step: int
    ) -> Iterator[ArrayRecord]:
        """Encode gradients, given by the number of the client.

        If all elements of every map are equal, as before an average over maps, one of
        each is sent exactly, unless the compressed gradient is smaller.
        """

        def encoded(client: int) -> ArrayRecord:
            with ends_run(round_.place(step, client, self.gradient_compressor)):
                seed = round_.seed("compress.gradient", client, step)
                return self._encoded(gradients[client], seed)

        return self._each(round_, encoded, gradients)

    def _encoded(self, gradient: torch.Tensor, seed: int) -> ArrayRecord:
        """Encode a gradient, or one element of each of its maps."""
        maps = one_of_each_map(gradient)
        frames = [] if maps is None else [EXACT.encode(maps)]
        if maps is None or self._encoder != EXACT:
            frames.append(self._encoder.encode(gradient, seed=seed))
        return messages.frame_record(min(frames, key=len))

    def _each(
        self, round_: Round, function: Callable[[int], T], clients: Iterable[int]
    ) -> Iterator[T]:
        """Yield a function of each client, of as many at a time as threads."""
        left = iter(clients)
        while several := list(islice(left, self._threads)):
            threads = torch.get_num_threads()
            with round_.watch("codec"):
                results = list(self._pool.map(function, several))
            torch.set_num_threads(threads)  # `_alone` sets them for all new threads
            while results:  # each may be let go before the next is asked for
                yield results.pop(0)


def _alone() -> None:
    """Let PyTorch run in this thread alone."""
    torch.get_num_threads()  # else the first operation would ask for their number again
    torch.set_num_threads(1)


def one_of_each_map(gradient: torch.Tensor) -> torch.Tensor | None:
    """Return one element of each map, shape (B, C, 1, 1), if all others are equal.

    Parameters
    ----------
    gradient : torch.Tensor
        Shape (B, C, H, W).

    Returns
    -------
    torch.Tensor | None
        None if they are not, if maps have one element, or if there are none.
    """
    if gradient.dim() != 4 or gradient[0, 0].numel() == 1:
        return None
    maps = gradient[..., :1, :1]
    if not torch.equal(gradient[:1], maps[:1].expand_as(gradient[:1])):
        return None  # the first sample shows it nearly always
    return maps if torch.equal(gradient, maps.expand_as(gradient)) else None
