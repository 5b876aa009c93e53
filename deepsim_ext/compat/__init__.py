"""Losses and miners with the names, arguments and values of the libraries that people come from.

    from deepsim_ext.compat.pytorch_metric_learning import BatchHardMiner, TripletMarginLoss
    from deepsim_ext.compat.sentence_transformers import BatchHardTripletLoss

Thin shells over `deepsim_ext.functional`; neither library has to be installed.
"""

from __future__ import annotations

from . import pytorch_metric_learning, sentence_transformers

__all__ = ["pytorch_metric_learning", "sentence_transformers"]
