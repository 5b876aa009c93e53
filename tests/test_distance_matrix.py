"""The matrix behind long lists of pairs: as exact as direct differences, also where a product is not."""

from __future__ import annotations

import math

import pytest
import torch

from deepsim_ext.compat import _matrix
from deepsim_ext.reference.distances import rowwise

from .samples import DISTANCES


@pytest.fixture(autouse=True)
def _by_products(monkeypatch):
    monkeypatch.setattr(_matrix, "FEW", 0)


def rows(n: int = 40, d: int = 9) -> torch.Tensor:
    """Far from the origin; some are the same, some hardly differ, one is zero."""
    x = torch.randn(n, d) + 100
    x[1] = x[0]
    x[3] = x[2] * (1 + 1e-6)
    x[5] = x[4] + 1e-4
    x[6] = 0
    return x


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("self_form", [True, False])
def test_values_and_gradients(distance, self_form):
    x = rows().requires_grad_()
    ref = x if self_form else rows()[:30].requires_grad_()
    got = _matrix.distance_matrix(x, ref, distance)
    exact = [t.detach().double().requires_grad_() for t in ((x,) if self_form else (x, ref))]
    expected = rowwise(exact[0][:, None], exact[-1], distance)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0 if distance != "cosine" else 1e-14)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad(got, (x,) if self_form else (x, ref), weight.float())
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, weight), strict=True):
        assert ((a.double() - b).norm(dim=1) <= 1e-5 * (1e-3 + b.norm(dim=1))).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_that_are_all_alike(distance):
    """More close pairs than are worth listing."""
    x = (torch.ones(20, 4) * 3).requires_grad_()
    d = _matrix.distance_matrix(x, x, distance)
    assert torch.equal(d, torch.zeros(20, 20))
    assert torch.equal(torch.autograd.grad(d.sum(), x)[0], torch.zeros(20, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_row_that_is_not_finite(distance, bad):
    x = rows()
    x[7, 2] = bad
    d = _matrix.distance_matrix(x, x, distance)
    for its_own in (d[7], d[:, 7]):
        assert (~its_own.isfinite()).sum() >= 39  # a zero row may hide it
    others = torch.arange(40) != 7
    expected = rowwise(x.double()[others][:, None], x.double()[others], distance)
    got = d[others][:, others].double()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0 if distance != "cosine" else 1e-14)
