from __future__ import annotations

import numpy as np
import pytest

from ldm_deploy.eval import distribution
from ldm_deploy.eval.distribution import GROUPS, KernelSum, Scatter, frechet_distance, jackknife_ci, set_distances

Sets = tuple[np.ndarray, np.ndarray]


def scatter(vectors: np.ndarray, block: int = 7) -> Scatter:
    found = Scatter(vectors[0])
    for start in range(0, len(vectors), block):
        found.add(vectors[start : start + block])
    return found


def paired(count: int, dimension: int, seed: int = 0) -> Sets:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimension, dimension)) / dimension**0.5
    first = rng.normal(size=(count, dimension)) @ mixing + 5
    return first, first + 0.4 * rng.normal(size=(count, dimension)) + 0.1


def textbook_frechet(first: np.ndarray, second: np.ndarray) -> float:
    """The formula as it stands, with scipy's root of a matrix."""
    from scipy.linalg import sqrtm

    covariances = np.cov(first.T), np.cov(second.T)
    step = first.mean(axis=0) - second.mean(axis=0)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    return float(step @ step + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root))


@pytest.mark.parametrize("dimension", [2, 8, 30])
def test_the_frechet_distance_is_the_textbooks(dimension: int) -> None:
    first, second = paired(200, dimension)
    found = frechet_distance(scatter(first), scatter(second[:150]))
    assert found == pytest.approx(textbook_frechet(first, second[:150]), rel=1e-9)


def test_fewer_vectors_than_dimensions_are_no_trouble() -> None:
    """The covariances are singular, which a root of their product takes badly: rotate to the space that is spanned."""
    first, second = paired(12, 8)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(60, 60)))
    wide = [np.pad(vectors, ((0, 0), (0, 52))) @ turn for vectors in (first, second)]
    expected = textbook_frechet(first, second)
    assert frechet_distance(scatter(wide[0]), scatter(wide[1])) == pytest.approx(expected, rel=1e-9)
    assert set_distances([(wide[0], wide[1])])["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-9)


def test_known_distances() -> None:
    vectors, _ = paired(20, 50)
    assert frechet_distance(scatter(vectors), scatter(vectors + 3)) == pytest.approx(9 * 50)
    variance = np.trace(np.cov(vectors.T))
    centred = vectors - vectors.mean(axis=0)
    assert frechet_distance(scatter(centred), scatter(3 * centred)) == pytest.approx(4 * variance)
    assert frechet_distance(scatter(vectors), scatter(vectors)) == pytest.approx(0, abs=1e-9 * variance)
    with pytest.raises(ValueError, match="two images or more"):
        frechet_distance(scatter(vectors[:1]), scatter(vectors))


def test_what_is_taken_out_of_a_scatter_is_as_if_it_had_not_been_there() -> None:
    vectors, others = paired(60, 5)
    rest = scatter(vectors).plus(scatter_at(vectors[0], vectors[:20]), -1)
    expected = frechet_distance(scatter(vectors[20:]), scatter(others))
    assert frechet_distance(rest, scatter(others)) == pytest.approx(expected, rel=1e-9)


def scatter_at(origin: np.ndarray, vectors: np.ndarray) -> Scatter:
    found = Scatter(origin)
    found.add(vectors)
    return found


def test_a_large_mean_costs_no_digits() -> None:
    first, second = paired(100, 6)
    far = 1e7
    assert frechet_distance(scatter(first + far), scatter(second + far)) == pytest.approx(
        textbook_frechet(first, second), rel=1e-5
    )


def test_the_kernel_distance_is_the_sum_over_pairs() -> None:
    first, second = (vectors / 10 for vectors in paired(9, 4))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y + 1) ** 3)

    terms = [
        kernel(first[i], first[j]) + kernel(second[i], second[j])
        - kernel(first[i], second[j]) - kernel(first[j], second[i])
        for i in range(9) for j in range(9) if i != j
    ]  # fmt: skip
    sums = KernelSum()
    sums.add(first, second)
    assert sums.value == pytest.approx(np.mean(terms))


def test_the_kernel_distance_is_unbiased_although_pairs_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets from one distribution, image i of one close to image i of the other: the expectation is 0.

    Including the pairs i = i, as for independent sets, would shift it far below 0.
    """
    monkeypatch.setattr(distribution, "RESAMPLES", 2)  # the interval is not looked at
    rng = np.random.default_rng(0)
    found, naive = [], []
    for _ in range(300):
        first = rng.normal(size=(8, 3))
        second = 0.95 * first + (1 - 0.95**2) ** 0.5 * rng.normal(size=(8, 3))
        sums = KernelSum()
        sums.add(first, second)
        found.append(sums.value)
        within = [(vectors @ vectors.T + 1) ** 3 for vectors in (first, second)]
        off = sum((matrix.sum() - np.trace(matrix)) / 56 for matrix in within)
        naive.append(off - 2 * ((first @ second.T + 1) ** 3).mean())
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(naive) < -10 * error


def test_both_see_a_difference_grow_and_their_intervals_hold_the_value() -> None:
    first, second = (vectors / 20 for vectors in paired(60, 10))
    found = [set_distances([(first, first + step * (second - first))]) for step in (0.0, 0.5, 1.0)]
    for name in ("frechet_distance", "kernel_distance"):
        figures = [distances[name] for distances in found]
        assert figures[0]["value"] == pytest.approx(0, abs=1e-12)
        assert figures[0]["value"] < figures[1]["value"] < figures[2]["value"]
        for figure in figures[1:]:
            assert figure["ci95"][0] < figure["value"] < figure["ci95"][1]
            assert (figure["n"], figure["reason"]) == (60, None)


def test_a_jackknife_interval_covers_what_is_estimated_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expectation of the estimate at this number of images, over 100 sets; the nominal level is 95 %."""
    monkeypatch.setattr(distribution, "RESAMPLES", 2)  # of the kernel distance
    rng = np.random.default_rng(5)
    found = []
    for _ in range(100):
        first = rng.normal(size=(40, 4))
        figure = set_distances([(first, 1.3 * first + 0.3 * rng.normal(size=(40, 4)))])["frechet_distance"]
        found.append((figure["value"], *figure["ci95"]))
    values, lows, highs = np.array(found).T
    covered = np.mean((lows <= values.mean()) & (values.mean() <= highs))
    assert 0.88 <= covered <= 0.99


def test_between_independent_sets_the_jackknife_holds_the_estimate_and_the_bootstrap_does_not() -> None:
    """Why the Fréchet distance is not bootstrapped."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 40, 30))
    value = frechet_distance(scatter(first), scatter(second))
    drawn = []
    for _ in range(30):
        rows = rng.integers(40, size=40)
        drawn.append(frechet_distance(scatter(first[rows]), scatter(second[rows])))
    assert np.percentile(drawn, 2.5) > value
    low, high = set_distances([(first, second)])["frechet_distance"]["ci95"]
    assert low < value < high


def test_blocks_are_one_set_and_the_frechet_distance_does_not_depend_on_their_borders() -> None:
    first, second = (vectors / 10 for vectors in paired(50, 6))
    whole = set_distances([(first, second)])["frechet_distance"]
    cut = set_distances([(first[:13], second[:13]), (first[13:40], second[13:40]), (first[40:], second[40:])])
    assert cut["frechet_distance"]["value"] == pytest.approx(whole["value"], rel=1e-9)
    assert cut["frechet_distance"]["ci95"] == pytest.approx(whole["ci95"], rel=1e-6)
    assert cut["kernel_distance"]["n"] == 50


def test_the_same_blocks_give_the_same_bits() -> None:
    first, second = paired(50, 6)
    blocks = [(first[:30], second[:30]), (first[30:], second[30:])]
    assert set_distances(blocks, seed=3) == set_distances(iter(blocks), seed=3)


@pytest.mark.parametrize("blocks", [[], [(np.zeros((1, 4)), np.zeros((1, 4)))]])
def test_one_image_is_no_set(blocks: list[Sets]) -> None:
    for figure in set_distances(blocks).values():
        assert (figure["value"], figure["reason"]) == (None, "a distance between sets needs two images or more")


def test_two_images_have_distances_without_a_jackknife_interval() -> None:
    first, second = paired(2, 3)
    assert set_distances([(first, second)])["frechet_distance"]["ci95"] is None
    assert jackknife_ci(1.0, [0.9]) is None
    assert GROUPS == 10
