"""Callbacks for Lightning's Trainer that know about ranks; they work under other strategies too."""

from lit_zero.callbacks.prediction_writer import PredictionWriter

__all__ = ["PredictionWriter"]
