"""LPIPS (Zhang et al. 2018, arXiv:1801.03924) through the `lpips` package, from weights that are already here.

Nothing is downloaded: `make setup` (eval/fetch_backbone.py) tries once, and without the file the reason is reported.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.eval.metrics import check_pair

if TYPE_CHECKING:
    from torch import Tensor

# backbone -> torchvision's file. A copy that was saved again has another digest: it is reported, not checked.
BACKBONES = {
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}
BATCH = 64  # images per forward pass; bounds the memory at about 30 MB for 64x64 images


def _weights_file(backbone: str) -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[backbone]


def backbones_there() -> list[str]:
    """The backbones whose weights are on this machine."""
    return [name for name in BACKBONES if _weights_file(name).is_file()]


class Lpips:
    """The distance of image pairs. `available` tells whether it can be computed, `reason` why not and what to do."""

    def __init__(self, backbone: str = "squeeze") -> None:
        if backbone not in BACKBONES:
            raise ValueError(f"LPIPS backbone {backbone!r} is unknown; allowed: {', '.join(BACKBONES)}")
        self.backbone = backbone
        self.weights_sha256: str | None = None
        self.reason: str | None = None
        self._network: Any = None
        try:
            import lpips  # noqa: F401
            import torch  # noqa: F401
        except ImportError as error:
            self.reason = f"the package {error.name!r} is not installed; install ldm-deploy[export]"
            return
        file = _weights_file(backbone)
        if not file.is_file():
            self.reason = (
                f"no weights of the LPIPS backbone: {file} is not there; "
                "run `make setup` with a network, or put the file there, or set TORCH_HOME"
            )
            return
        try:
            self._network, self.weights_sha256 = _load(backbone, file, file.stat().st_mtime_ns)
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError ... for damage
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self.reason = f"the LPIPS backbone {file} cannot be read ({first}); delete it and run `make setup`"

    @property
    def available(self) -> bool:
        return self.reason is None

    def __call__(self, reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) twice -> float64 (n,), 0 for equal images. Raises `ValueError` if they do not compare."""
        return self.compare(reference, candidate)[0]

    def compare(self, reference: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distance of each pair, and what `distribution.py` takes of each image: see `set_features`.

        uint8 (n, H, W, 3) twice -> float64 (n,), float32 (n, d), float32 (n, d). Each image passes through the backbone
        once. Raises `ValueError` if the images do not compare.
        """
        import lpips
        import torch

        check_pair(reference, candidate)
        found = []
        with torch.inference_mode():
            for start in range(0, len(reference), BATCH):
                one, other = (self._layers(_tensor(images[start : start + BATCH])) for images in (reference, candidate))
                distance = (self._embed(one) - self._embed(other)).double().square().sum(1)
                last = (lpips.normalize_tensor(layers[-1]).mean((2, 3)) for layers in (one, other))
                found.append((distance.numpy(), *(vectors.numpy() for vectors in last)))
        distances, first, second = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return distances, first, second

    @property
    def set_features(self) -> str:
        """What `compare` gives for distances between sets of images, in words."""
        return f"last layer of the LPIPS backbone {self.backbone}, unit length per pixel, mean over pixels"

    def nearest(self, queries: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gallery image nearest to each query: uint8 (q, H, W, 3), (g, H, W, 3) -> index int64 (q,), distance (q,).

        The distance is a squared Euclidean one between features (see `features`), so each image passes through the
        backbone once. Memory: the features of all queries and of one batch of the gallery.
        """
        import torch

        with torch.inference_mode():
            query = torch.cat(list(self._batches(queries)))
            norms = query.double().square().sum(1)
            distances = []
            for batch in self._batches(gallery):
                inner = (query @ batch.T).double()
                distances.append((norms[:, None] + batch.double().square().sum(1) - 2 * inner).clamp_min(0))
            found = torch.cat(distances, dim=1)
            best = found.argmin(1)
            return best.numpy(), found.gather(1, best[:, None])[:, 0].numpy()

    def _batches(self, images: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(images), BATCH):
            yield self.features(_tensor(images[start : start + BATCH]))

    def features(self, images: Tensor) -> Tensor:
        """Vectors whose squared Euclidean distance is LPIPS: float (n, 3, H, W) in [-1, 1] -> float (n, features).

        LPIPS = sum over layers l of mean over pixels of sum over channels c of w_lc (f_lc - g_lc)², where f and g are
        features of unit length per pixel and w >= 0 (eq. 1): multiply each by sqrt(w_lc / pixels).
        """
        return self._embed(self._layers(images))

    def _layers(self, images: Tensor) -> list[Tensor]:
        """The backbone's activations that LPIPS looks at: float (n, 3, H, W) in [-1, 1] -> (n, channels, h, w) each."""
        network = self.network()
        return list(network.net(network.scaling_layer(images)))

    def _embed(self, layers: Sequence[Tensor]) -> Tensor:
        import lpips
        import torch

        parts = []
        for layer, head in zip(layers, self.network().lins, strict=True):
            weight = head.model[-1].weight.clamp_min(0)  # (1, channels, 1, 1)
            pixels = layer.shape[2] * layer.shape[3]
            parts.append((lpips.normalize_tensor(layer) * (weight / pixels).sqrt()).flatten(1))
        return torch.cat(parts, dim=1)

    def as_loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The distance, differentiable: two float (n, 3, H, W) in [-1, 1] -> (n,). None where it cannot be had."""
        if not self.available:
            return None
        network = self.network()
        return lambda image, other: network.to(image.device)(image, other).flatten()

    def network(self) -> Any:
        """The `lpips.LPIPS` module. Raises `RuntimeError` with the reason where it cannot be had."""
        if self.reason is not None:
            raise RuntimeError(f"LPIPS cannot be computed: {self.reason}")
        return self._network


@functools.cache
def _load(backbone: str, file: Path, modified_ns: int) -> tuple[Any, str]:
    """(the published heads on the backbone in `file`, its sha256). lpips itself might download, through torchvision."""
    import lpips
    import torch

    weights = torch.load(file, map_location="cpu", weights_only=True)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips calls torchvision by names that it deprecates
        network = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    # torchvision's "features.3.squeeze.weight" is lpips' "slice2.3.squeeze.weight"
    ours = network.net.state_dict()
    network.net.load_state_dict({key: weights["features." + key.partition(".")[2]] for key in ours})
    return network.eval().requires_grad_(False), hashlib.sha256(file.read_bytes()).hexdigest()


def _tensor(images: np.ndarray) -> Tensor:
    """uint8 (n, H, W, 3) -> float (n, 3, H, W) in [-1, 1]."""
    import torch

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"LPIPS needs uint8 (n, H, W, 3); got {images.dtype} {images.shape}")
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
