"""Training losses of both stages."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) in nats per image, shape (batch,) (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def reconstruction_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute plus mean squared difference over all pixels: a scalar. Both (batch, 3, H, W) in [-1, 1]."""
    return functional.l1_loss(reconstruction, image) + functional.mse_loss(reconstruction, image)
