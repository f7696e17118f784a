"""A codebook instead of a Gaussian: the VQ autoencoder.

van den Oord et al. 2017, arXiv:1711.00937. As in Rombach et al. 2022 (arXiv:2112.10752, section 3.1, "VQ-reg.") the
quantizer is the first layer of the decoder, so that diffusion works on the continuous latents before it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

DECAY = 0.99  # of the running counts and sums that an averaged codebook is made of


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by its nearest code: (batch, z, h, w) -> the same shape.

    The buffers are for training; a saved model has the codebook alone.
    """

    idle: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.averaged = False
        self.codebook = nn.Parameter(torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes))
        self.register_buffer("idle", torch.zeros(codes), persistent=False)  # steps since each code was last used
        self.register_buffer("count", torch.ones(codes), persistent=False)
        self.register_buffer("total", self.codebook.detach().clone(), persistent=False)

    def follow_mean(self) -> None:
        """Let codes follow the running mean of their vectors (appendix A.1 of the paper) instead of a gradient."""
        self.averaged = True
        self.codebook.requires_grad_(False)

    def nearest(self, latent: Tensor) -> Tensor:
        """Index of the nearest code of each vector: int64 (batch, h, w)."""
        vectors = latent.permute(0, 2, 3, 1)
        # |v - e|^2 without |v|^2, which is the same for every code
        return (self.codebook.square().sum(1) - 2 * vectors @ self.codebook.T).argmin(-1)

    def forward(self, latent: Tensor) -> Tensor:
        return self.codebook[self.nearest(latent)].permute(0, 3, 1, 2)

    def train_step(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(quantized, codebook loss, commitment loss, indices) of (batch, z, h, w).

        Gradients pass through the quantized values to the latent unchanged (the straight-through estimator); the losses
        are the second and third term of eq. 3, means over all elements, the third without its weight.
        """
        indices = self.nearest(latent.detach())
        quantized = self.codebook[indices].permute(0, 3, 1, 2)
        codebook_loss = functional.mse_loss(quantized, latent.detach())
        commitment = functional.mse_loss(latent, quantized.detach())
        return latent + (quantized - latent).detach(), codebook_loss, commitment, indices

    @torch.no_grad()
    def statistics(self, latent: Tensor, indices: Tensor) -> Tensor:
        """How often each code was used and the sum of its vectors: (codes, 1 + z), ready to be summed over batches."""
        vectors = latent.permute(0, 2, 3, 1).flatten(0, 2).float()
        ones = torch.cat([torch.ones_like(vectors[:, :1]), vectors], dim=1)
        codes, channels = self.codebook.shape
        return ones.new_zeros(codes, channels + 1).index_add_(0, indices.flatten(), ones)

    @torch.no_grad()
    def update(self, statistics: Tensor, candidates: Tensor, restart_after: int) -> dict[str, float]:
        """After a step: move averaged codes, restart dead ones, report.

        `statistics`: of the whole batch. A code that was not used for `restart_after` steps (0: never) becomes one of
        `candidates` (n, z), latents of this batch (Dhariwal et al. 2020, arXiv:2005.00341, section 3.1). Returns
        `perplexity`, e to the entropy of the codes used, and `codes_used`, their share.
        """
        counts, sums = statistics[:, 0], statistics[:, 1:]
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        if self.averaged:
            self.count.lerp_(counts, 1 - DECAY)
            self.total.lerp_(sums, 1 - DECAY)
            self.codebook.copy_(self.total / self.count.clamp_min(1e-5)[:, None])
        if restart_after:
            dead = (self.idle >= restart_after).nonzero()[:, 0][: len(candidates)]
            fresh = candidates[: len(dead)].to(self.codebook)
            self.codebook.index_copy_(0, dead, fresh)
            self.total.index_copy_(0, dead, fresh)
            self.count.index_fill_(0, dead, 1.0)
            self.idle.index_fill_(0, dead, 0.0)
        share = counts / counts.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return {"perplexity": entropy.exp().item(), "codes_used": (counts > 0).float().mean().item()}
