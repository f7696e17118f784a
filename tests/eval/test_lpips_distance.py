from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm_deploy.eval.lpips_distance import BACKBONES, WEIGHTS, Lpips


@pytest.fixture(scope="module")
def squeeze() -> Lpips:
    lpips = Lpips("squeeze")
    if not lpips.available:
        pytest.skip(str(lpips.reason))
    return lpips


def noise(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, size // 8, size // 8, 1), np.uint8))


def test_the_published_example(squeeze: Lpips) -> None:
    """The value that torchmetrics documents for these inputs."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        one, other = torch.rand(10, 3, 100, 100), torch.rand(10, 3, 100, 100)
    distance = squeeze.network()(one, other, normalize=True).mean().item()
    assert distance == pytest.approx(0.1008, abs=5e-5)


def test_it_is_the_packages_own_distance(squeeze: Lpips, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import lpips
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="squeeze", verbose=False)
    one, other = noise(3), noise(3, seed=1)

    def tensor(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    expected = theirs(tensor(one), tensor(other)).flatten().detach().numpy()
    np.testing.assert_allclose(squeeze(one, other), expected, atol=1e-6)
    np.testing.assert_allclose(squeeze(one, one), 0, atol=1e-7)


def test_as_a_loss_it_is_the_same_distance_and_pulls_images_together(squeeze: Lpips, tmp_path: Path) -> None:
    import torch

    distance = squeeze.as_loss()
    assert distance is not None
    one, other = noise(2), noise(2, seed=1)

    def tensor(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    moving = tensor(other).requires_grad_()
    before = distance(tensor(one), moving)
    np.testing.assert_allclose(before.detach().numpy(), squeeze(one, other), rtol=1e-5)
    (gradient,) = torch.autograd.grad(before.sum(), moving)
    after = distance(tensor(one), (moving - 0.002 * gradient / gradient.abs().mean()).detach())
    assert (after < before).all()


def test_nearest_finds_what_comparing_every_pair_finds(squeeze: Lpips) -> None:
    queries, gallery = noise(2, 32, seed=2), noise(68, 32, seed=3)  # more than one batch
    gallery[66] = np.clip(queries[1].astype(int) + 3, 0, 255)
    every = np.stack([squeeze(np.repeat(query[None], len(gallery), 0), gallery) for query in queries])
    index, distance = squeeze.nearest(queries, gallery)
    np.testing.assert_array_equal(index, every.argmin(1))
    np.testing.assert_allclose(distance, every.min(1), atol=1e-4)
    assert index[1] == 66


def test_the_weights_are_named_by_their_digest(squeeze: Lpips) -> None:
    assert squeeze.weights_sha256 is not None
    assert len(squeeze.weights_sha256) == 64


def test_unequal_images_are_refused(squeeze: Lpips) -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        squeeze(noise(2), noise(2, 32))
    with pytest.raises(ValueError, match="LPIPS needs uint8"):
        squeeze(noise(2).astype(np.float32), noise(2).astype(np.float32))


def test_absent_weights_are_a_reason_with_the_remedy_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(WEIGHTS, raising=False)
    lpips = Lpips("squeeze")
    assert not lpips.available
    assert lpips.weights_sha256 is None
    file = tmp_path / "hub" / "checkpoints" / BACKBONES["squeeze"]
    assert str(file) in str(lpips.reason)
    assert "run `make setup`" in str(lpips.reason)
    with pytest.raises(RuntimeError, match="LPIPS cannot be computed: no weights"):
        lpips(noise(1), noise(1))


@pytest.mark.parametrize("how", ["file", "folder"])
def test_weights_may_be_named_by_their_path(
    squeeze: Lpips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    import torch

    original = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES["squeeze"]
    own = tmp_path / ("mine.pth" if how == "file" else BACKBONES["squeeze"])
    shutil.copyfile(original, own)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv(WEIGHTS, str(own if how == "file" else tmp_path))
    lpips = Lpips("squeeze")
    assert lpips.weights_sha256 == squeeze.weights_sha256
    np.testing.assert_array_equal(lpips(noise(2), noise(2, seed=1)), squeeze(noise(2), noise(2, seed=1)))
    own.unlink()
    assert f"{own} is not there" in str(Lpips("squeeze").reason)
    assert f"or name it: {WEIGHTS}=FILE" in str(Lpips("squeeze").reason)


def test_features_of_sets_are_of_unit_length_at_most_and_come_with_the_distance(squeeze: Lpips) -> None:
    import torch

    one, other = noise(3), noise(3, seed=1)
    distance, first, second = squeeze.compare(one, other)
    np.testing.assert_array_equal(distance, squeeze(one, other))
    assert first.shape == second.shape == (3, 512)
    with torch.inference_mode():
        scaled = squeeze.network().scaling_layer(torch.from_numpy(other).permute(0, 3, 1, 2).float() / 127.5 - 1)
        last = squeeze.network().net(scaled)[-1]
    expected = (last / last.square().sum(1, keepdim=True).sqrt()).mean((2, 3)).numpy()
    np.testing.assert_allclose(second, expected, atol=1e-5)
    assert np.linalg.norm(first, axis=1).max() <= 1


@pytest.mark.parametrize("damage", ["cut", "other model", "text"])
def test_damaged_weights_are_a_reason(
    squeeze: Lpips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    import torch

    original = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES["squeeze"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / BACKBONES["squeeze"]
    file.parent.mkdir(parents=True)
    if damage == "cut":
        shutil.copyfile(original, file)
        with file.open("r+b") as stream:
            stream.truncate(100_000)
    elif damage == "text":
        file.write_text("not weights")
    else:
        torch.save({"features.0.weight": torch.zeros(1)}, file)
    lpips = Lpips("squeeze")
    assert not lpips.available
    assert f"{file} cannot be read" in str(lpips.reason)
    assert "\n" not in str(lpips.reason)


def test_an_unknown_backbone_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backbone 'squeezenet' is unknown; allowed: squeeze, alex, vgg"):
        Lpips("squeezenet")
