"""The modules: the same values as the functions, options checked at construction."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from deepsim_ext import functional, nn

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
MAPS = X.reshape(2, 3, 4)
GRAM = torch.ones(3, 3)

# module, its options, the function it stands for, arguments
MODULES = [
    (nn.BatchHardTripletLoss, {}, functional.batch_hard_triplet_loss, (X, LABELS)),
    (
        nn.BatchHardTripletLoss,
        {"margin": 1, "soft": True, "distance": "cosine", "reduction": "sum", "return_stats": True},
        functional.batch_hard_triplet_loss,
        (X, LABELS, X + 1, LABELS),
    ),
    (nn.BatchHardTripletLoss, {"margin": 0.7}, functional.batch_hard_triplet_loss, (X, LABELS)),
    (
        nn.BatchHardTripletLoss,
        {"positive": "easy", "negative": "semihard"},
        functional.batch_hard_triplet_loss,
        (X, LABELS),
    ),
    (nn.BatchAllTripletLoss, {}, functional.batch_all_triplet_loss, (X, LABELS)),
    (
        nn.BatchAllTripletLoss,
        {"margin": 1, "distance": "cosine", "reduction": "sum", "return_stats": True},
        functional.batch_all_triplet_loss,
        (X, LABELS, X + 1, LABELS),
    ),
    (nn.BatchSemiHardTripletLoss, {}, functional.batch_semi_hard_triplet_loss, (X, LABELS)),
    (
        nn.BatchSemiHardTripletLoss,
        {"margin": 2, "definition": "pml", "reduction": "sum", "return_stats": True},
        functional.batch_semi_hard_triplet_loss,
        (X, LABELS, X + 1, LABELS),
    ),
    (nn.BatchContrastiveLoss, {}, functional.batch_contrastive_loss, (X, LABELS)),
    (
        nn.BatchContrastiveLoss,
        {"pos_margin": 1, "neg_margin": 3, "squared": True, "reduction": "mean", "return_stats": True},
        functional.batch_contrastive_loss,
        (X, LABELS, X + 1, LABELS),
    ),
    (nn.TripletMarginLoss, {}, functional.triplet_margin_loss, (X, X + 1, X - 1)),
    (
        nn.TripletMarginLoss,
        {"margin": 2, "swap": True, "distance": "euclidean", "reduction": "none"},
        functional.triplet_margin_loss,
        (X, X + 1, X - 1),
    ),
    (nn.ContrastiveLoss, {}, functional.contrastive_loss, (X, X + 1, LABELS > 1)),
    (
        nn.ContrastiveLoss,
        {"margin": 2, "reduction": "none"},
        functional.contrastive_loss,
        (X, X + 1, LABELS > 1),
    ),
    (nn.GramMatrix, {}, functional.gram_matrix, (MAPS,)),
    (nn.GramMatrix, {"normalize": 3.0}, functional.gram_matrix, (MAPS,)),
    (nn.StyleLoss, {}, functional.style_loss, (MAPS, GRAM)),
    (
        nn.StyleLoss,
        {"weights": [1, 0.5], "normalize": "hw", "reduction": "gatys", "distance": "l1"},
        functional.style_loss,
        ([MAPS, MAPS], [GRAM, GRAM]),
    ),
    (nn.ContentLoss, {}, functional.content_loss, (X, X + 1)),
    (
        nn.ContentLoss,
        {"weights": (2, 3), "reduction": "gatys"},
        functional.content_loss,
        ([X, X], [X, X + 1]),
    ),
    (nn.TotalVariationLoss, {}, functional.total_variation_loss, (MAPS,)),
    (
        nn.TotalVariationLoss,
        {"distance": "l1", "reduction": "sum"},
        functional.total_variation_loss,
        (MAPS,),
    ),
]


@pytest.mark.parametrize(("module", "options", "function", "args"), MODULES)
def test_module_equals_function(module, options, function, args) -> None:
    built = module(**options)
    for each in (built, copy.deepcopy(built)):
        torch.testing.assert_close(each(*args), function(*args, **options), rtol=0, atol=0)
    assert not list(built.parameters()) and not built.state_dict()


def test_repr_names_the_options() -> None:
    assert repr(nn.ContrastiveLoss(margin=2)) == "ContrastiveLoss(margin=2, reduction='mean')"
    assert repr(nn.GramMatrix()) == "GramMatrix(normalize='chw')"
    assert repr(nn.ContentLoss(weights=[1])) == "ContentLoss(weights=[1], reduction='mean')"
    assert repr(nn.BatchHardTripletLoss()) == (
        "BatchHardTripletLoss(positive='hard', negative='hard', margin=0.2, soft=False, "
        "distance='euclidean', reduction='mean', return_stats=False)"
    )
    assert repr(nn.StyleLoss()) == "StyleLoss(weights=None, normalize='chw', reduction='mean', distance='l2')"


@pytest.mark.parametrize(
    ("module", "options", "kind", "message"),
    [
        (nn.BatchHardTripletLoss, {"margin": -1}, ValueError,
         "margin must be a finite number >= 0, got int -1"),
        (nn.BatchHardTripletLoss, {"negative": "hardest"}, ValueError,
         'negative must be one of "hard", "easy", "semihard", got "hardest"'),
        (nn.BatchHardTripletLoss, {"soft": 1}, TypeError, "soft must be True or False, got int 1"),
        (nn.BatchHardTripletLoss, {"return_stats": 0}, TypeError,
         "return_stats must be True or False, got int 0"),
        (nn.BatchHardTripletLoss, {"distance": "l2"}, ValueError,
         'distance must be one of "euclidean", "sqeuclidean", "cosine", got "l2"'),
        (nn.BatchHardTripletLoss, {"reduction": "avg"}, ValueError,
         'reduction must be one of "mean", "mean_nonzero", "sum", "none", got "avg"'),
        (nn.BatchAllTripletLoss, {"reduction": "none"}, ValueError,
         'reduction must be one of "mean", "mean_nonzero", "sum", got "none"'),
        (nn.BatchSemiHardTripletLoss, {"definition": "hard"}, ValueError,
         'definition must be one of "facenet", "tfa", "pml", got "hard"'),
        (nn.BatchContrastiveLoss, {"neg_margin": -1}, ValueError,
         "neg_margin must be a finite number >= 0, got int -1"),
        (nn.TripletMarginLoss, {"swap": 1}, TypeError, "swap must be True or False, got int 1"),
        (nn.ContrastiveLoss, {"margin": math.nan}, ValueError,
         "margin must be a finite number >= 0, got float nan"),
        (nn.ContrastiveLoss, {"reduction": "mean_nonzero"}, ValueError,
         'reduction must be one of "mean", "sum", "none", got "mean_nonzero"'),
        (nn.GramMatrix, {"normalize": 0}, ValueError,
         'normalize must be one of "none", "hw", "chw", "bchw" or a finite number > 0, got int 0'),
        (nn.StyleLoss, {"weights": 1.0}, TypeError,
         "weights must be None or a list or tuple of finite numbers, got float 1.0"),
        (nn.StyleLoss, {"normalize": "c"}, ValueError,
         'normalize must be one of "none", "hw", "chw", "bchw" or a finite number > 0, got "c"'),
        (nn.StyleLoss, {"reduction": "none"}, ValueError,
         'reduction must be one of "mean", "sum", "gatys", got "none"'),
        (nn.StyleLoss, {"distance": "L1"}, ValueError,
         'distance must be one of "l2", "l1", "frobenius", got "L1"'),
        (nn.StyleLoss, {"distance": "frobenius"}, ValueError,
         'reduction must be "sum" where distance="frobenius", got "mean"'),
        (nn.TotalVariationLoss, {"distance": "frobenius"}, ValueError,
         'distance must be one of "l2", "l1", got "frobenius"'),
        (nn.TotalVariationLoss, {"reduction": "gatys"}, ValueError,
         'reduction must be one of "mean", "sum", got "gatys"'),
        (nn.ContentLoss, {"weights": ["1"]}, TypeError, 'weights[0] must be a finite number, got "1"'),
        (nn.ContentLoss, {"reduction": None}, TypeError,
         'reduction must be one of "mean", "sum", "gatys", got None'),
    ],
)  # fmt: skip
def test_options_are_checked_at_construction(module, options, kind, message) -> None:
    with pytest.raises(kind) as raised:
        module(**options)
    assert type(raised.value) is kind and str(raised.value) == f"{module.__name__}: {message}"
