"""Clustered weights: a table of distinct values computes what the whole map would."""

import pytest
import torch

from paceline.compress.base import Statistic, Statistics
from paceline.compress.quantize.edkm import Table, nearest, plain_centroids
from paceline.errors import MethodError
from paceline.models.tensors import Codebook
from paceline.registry import quantizers


def whole_map(weights, centroids, temperature):
    """Differentiable k-means over all weights, as the paper defines it: one round."""
    flat = weights.flatten()

    def attention():
        return (-(flat[:, None] - centroids).square() / temperature).softmax(-1)

    for _ in range(3):
        shares = attention()
        centroids = (shares * flat[:, None]).sum(0) / shares.sum(0)
    return (attention() @ centroids).reshape(weights.shape)


def test_values_and_gradients_are_those_of_the_whole_map():
    torch.manual_seed(0)
    start = torch.randint(-40, 40, (24, 32)) / 16  # few distinct values, all in half precision
    centroids, target = torch.tensor([-1.5, -0.4, 0.3, 1.6]), torch.randn(24, 32)
    results = []
    for tabled in (False, True):
        weights = start.clone().requires_grad_()
        if tabled:
            table = Table.of(weights)
            assert len(table.values) < 81
            found = table.soft(weights, table.centroids(centroids, 0.2), 0.2)
        else:
            found = whole_map(weights, centroids, 0.2)
        ((found - target) ** 2).sum().backward()
        results.append((found.detach(), weights.grad))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-3, rtol=1e-3)


def test_training_keeps_no_map_of_all_weights():
    torch.manual_seed(0)
    weights = (torch.randint(-40, 40, (200, 200)) / 16).requires_grad_()
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        table = Table.of(weights)
        centroids = table.centroids(torch.linspace(-2, 2, 16), 0.1)
        table.soft(weights, centroids, 0.1).sum().backward()
    assert max(sizes) <= weights.numel()  # 16 times as many in a whole map


def test_plain_centroids_are_a_fixed_point_of_k_means():
    torch.manual_seed(0)
    values = torch.randn(60, 50)
    centroids = plain_centroids(values, 8, rounds=200)
    codes = nearest(values, centroids)
    for code in range(8):
        assert float(values[codes == code].mean() - centroids[code]) == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("bits", [2, 3])
def test_training_lowers_the_error_of_the_outputs(bits):
    torch.manual_seed(0)
    x = torch.randn(600, 48) @ (torch.randn(48, 48) * torch.logspace(0, -1.5, 48))
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    weight = torch.randn(32, 48)

    def error(steps):
        method = quantizers.parse(f"edkm:bits={bits},group=48,steps={steps}")
        stored = method.compress(weight, stats)
        assert isinstance(stored, Codebook)
        assert stored.entries.shape == (1, 1, 2**bits, 1)
        return float((x @ (torch.from_numpy(stored.dense()) - weight).T).square().sum())

    assert error(100) < 0.85 * error(0)


def test_wrong_settings_are_refused():
    with pytest.raises(MethodError, match="edkm:bits is 9"):
        quantizers.parse("edkm:bits=9")
