"""The two losses of the recipes, for labels or for the soft targets of a mixed batch.

Source matched, timm 1.0.31: `timm/loss/binary_cross_entropy.py`,
`timm/loss/cross_entropy.py`, and `mixup_target` of `timm/data/mixup.py`.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rsb_ffcv import check_choice


def soft_targets(
    labels: torch.Tensor,
    num_classes: int,
    lam: float | torch.Tensor | None = None,
    *,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Returns the targets of a batch: labels int64 (n,) -> float32 (n, num_classes).

    lam: share of the image's own target, a number or a tensor of shape (n, 1). The partner, image
        n - 1 - i, has the share 1 - lam. None: not mixed.
    smoothing: a one-hot target has smoothing / K for every class, plus 1 - smoothing for its label.
    """
    off = smoothing / num_classes
    own = torch.full((len(labels), num_classes), off, device=labels.device)
    own.scatter_(1, labels[:, None], 1 - smoothing + off)
    return own if lam is None else own * lam + own.flip(0) * (1 - lam)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Scalar loss of logits (n, K), labels int64 (n,) and the mix's lam (None: not mixed).

    kind: "bce" and "ce" smooth labels and mixed targets alike. "auto" is bce on unsmoothed targets
        for mixed batches, and smoothed cross-entropy for others.
    smoothing: share of the target that is spread over all classes.
    threshold: bce: targets above it become 1, the others 0; 0 leaves them soft.
    sum_classes: bce: sum over K and mean over n, instead of the mean over both.

    Raises InputError for an unknown kind.
    """

    kind: str
    smoothing: float = 0.0
    threshold: float = 0.0
    sum_classes: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("bce", "ce", "auto"))

    def name(self, mixed: bool) -> str:
        """Returns "bce" or "ce": the loss of a batch that is, or is not, mixed."""
        return self.kind if self.kind != "auto" else "bce" if mixed else "ce"

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, lam: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the loss, a 0-dim float32 tensor.

        logits: (n, K).
        labels: int64 (n,).
        lam: see `soft_targets`.
        """
        logits = logits.float()
        mixed = lam is not None
        smoothing = 0.0 if self.kind == "auto" and mixed else self.smoothing
        targets = soft_targets(labels, logits.shape[1], lam, smoothing=smoothing)
        if self.name(mixed) == "ce":
            return F.cross_entropy(logits, targets)
        if self.threshold:
            targets = (targets > self.threshold).float()
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return loss.sum(1).mean() if self.sum_classes else loss.mean()
