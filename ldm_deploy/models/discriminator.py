"""The PatchGAN discriminator: says of each patch of an image whether it is real.

Isola et al. 2017, arXiv:1611.07004, section 3.2 and appendix 6.1.2.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

NORMS = ("group", "batch", "none")


class PatchDiscriminator(nn.Module):
    """image (batch, 3, H, W) in [-1, 1] -> logits (batch, 1, H/2^n_layers - 2, W/2^n_layers - 2), real above 0.

    `ndf`: channels of the first layer. `norm`: "group" depends on one image alone and works at any batch size; "batch"
    is the paper's. `spectral`: spectral normalisation of every convolution (Miyato et al. 2018, arXiv:1802.05957).
    """

    def __init__(self, n_layers: int = 3, ndf: int = 64, norm: str = "group", spectral: bool = False) -> None:
        super().__init__()
        widths = [ndf * min(2**level, 8) for level in range(n_layers + 1)]

        def convolution(inputs: int, outputs: int, stride: int, bias: bool) -> nn.Module:
            layer = nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=bias)
            nn.init.normal_(layer.weight, 0.0, 0.02)
            return spectral_norm(layer) if spectral else layer

        def normalization(channels: int) -> nn.Module:
            if norm == "batch":
                return nn.BatchNorm2d(channels)
            return nn.GroupNorm(min(16, channels), channels) if norm == "group" else nn.Identity()

        layers: list[nn.Module] = [convolution(3, widths[0], 2, True), nn.LeakyReLU(0.2)]
        for level in range(1, n_layers + 1):
            stride = 2 if level < n_layers else 1
            layers += [
                convolution(widths[level - 1], widths[level], stride, norm == "none"),
                normalization(widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, convolution(widths[-1], 1, 1, True))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)
