"""Losses of the autoencoder; those of the denoiser are in `diffusion/objective.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

# (image, reconstruction), both (batch, 3, H, W) in [-1, 1] -> distance (batch,), differentiable
Perceptual = Callable[[Tensor, Tensor], Tensor]


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) in nats per image, shape (batch,) (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def reconstruction_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute plus mean squared difference over all pixels: a scalar. Both (batch, 3, H, W) in [-1, 1]."""
    return functional.l1_loss(reconstruction, image) + functional.mse_loss(reconstruction, image)


def log_error(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Logarithm of each image's mean squared difference, averaged: a scalar. Both (batch, 3, H, W) in [-1, 1].

    As a loss: Chen et al. 2021, "HINet", arXiv:2105.06086. A difference of 0.23 is one decibel of PSNR, whatever the
    image: a drawing that is easy weighs as much as a hard one. Above 56 dB an error counts less and less.
    """
    return (reconstruction - image).square().mean(dim=(1, 2, 3)).add(1e-5).log().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, from its logits (Lim and Ye 2017, arXiv:1705.02894, eq. 8; half of it)."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder minimises, from the logits of its images (the same paper, eq. 9)."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor,
    generator: Tensor,
    last_layer: Tensor,
    sum_: Callable[[list[Tensor]], None] = lambda tensors: None,
) -> Tensor:
    """Weight of the generator loss at which it pulls the last layer as hard as the reconstruction loss: a scalar.

    |grad of reconstruction| / (|grad of generator| + 1e-4), at most 1e4 (Esser et al. 2021, arXiv:2012.09841, eq. 7
    with the released code's delta). `sum_` adds gradients of the same batch from other processes, in place.
    """
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, generator)]
    sum_(gradients)
    return (gradients[0].norm() / (gradients[1].norm() + 1e-4)).clamp(0, 1e4).detach()


def gradient_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """R1: half the squared norm of the logits' gradient at real images, mean over the batch: a scalar.

    Mescheder et al. 2018, arXiv:1801.04406, eq. 9, without its weight.
    """
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()
