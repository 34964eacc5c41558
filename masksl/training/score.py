"""The loss, and scores of logits against labels."""

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Score:
    """Sums over test samples.

    Parameters
    ----------
    samples : int
        Number of samples.
    loss : float
        Sum of their cross-entropies.
    top1, top5 : int
        Samples whose label has the highest logit, one of the five highest.
    """

    samples: int = 0
    loss: float = 0.0
    top1: int = 0
    top5: int = 0

    def __add__(self, other: "Score") -> "Score":
        """Return the sums over both."""
        return Score(
            self.samples + other.samples,
            self.loss + other.loss,
            self.top1 + other.top1,
            self.top5 + other.top5,
        )

    def means(self) -> dict[str, float]:
        """Return ``test_loss``, ``top1`` and ``top5`` a sample."""
        return {
            "test_loss": self.loss / self.samples,
            "top1": self.top1 / self.samples,
            "top5": self.top5 / self.samples,
        }


def mean_loss(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Return the mean cross-entropy of logits (n, classes) against labels (n,).

    ``smoothing`` is `OptimizerConfig.label_smoothing`.
    """
    return functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def score(logits: torch.Tensor, labels: torch.Tensor) -> Score:
    """Score logits against labels.

    Parameters
    ----------
    logits : torch.Tensor
        Shape (n, classes).
    labels : torch.Tensor
        int64, shape (n,), on the same device.
    """
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1])).indices  # (n, 5)
    hits = best == labels[:, None]
    return Score(len(labels), loss.item(), int(hits[:, :1].sum()), int(hits.sum()))
