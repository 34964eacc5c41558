"""Payloads at the cut, as the server sees them: activations and gradients."""

import torch
from flwr.app import ArrayRecord, RecordDict

from masksl.compress import FrameError, decode, kept_positions
from masksl.dataset import DATASETS
from masksl.methods.split.messages import ACTIVATION, labels_of
from masksl.runtime import messages
from masksl.runtime.compressors import EXACT, compressor_of
from masksl.runtime.messages import ends_run
from masksl.runtime.round import Round
from masksl.settings import Settings


class Payloads:
    """Decodes activations and encodes gradients.

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

    @property
    def changes_gradients(self) -> bool:
        """Whether gradients are not sent as they are."""
        return self._encoder != EXACT or self._at_kept

    # pylint: disable-next=too-many-arguments,too-many-positional-arguments
    def decode(
        self,
        round_: Round,
        client: int,
        content: RecordDict,
        step: int,
        most: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the activation and the labels of a reply.

        Parameters
        ----------
        round_ : Round
            The current round.
        client : int
            Number of the client.
        content : RecordDict
            Content of its reply.
        step : int
            Step within the round.
        most : int
            Samples at most.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            float32, shape (n, ...), and int64, shape (n,), on the device of the half.
        """
        with ends_run(round_.place(step, client, self.compressor)):
            frame = messages.frame_of(content, ACTIVATION)
            count = most * self._shape.numel()
            with round_.watch("codec"):
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

    def encode_gradient(
        self, round_: Round, client: int, gradient: torch.Tensor, step: int
    ) -> ArrayRecord:
        """Encode the gradient of a client.

        If all elements of every map are equal, as before an average over maps, one of
        each is sent exactly, unless the compressed gradient is smaller.
        """
        with ends_run(round_.place(step, client, self.gradient_compressor)):
            seed = round_.seed("compress.gradient", client, step)
            with round_.watch("codec"):
                maps = one_of_each_map(gradient)
                frames = [] if maps is None else [EXACT.encode(maps)]
                if maps is None or self._encoder != EXACT:
                    frames.append(self._encoder.encode(gradient, seed=seed))
                return messages.frame_record(min(frames, key=len))


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
