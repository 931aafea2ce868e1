"""Pipeline stages for an unmodified LightningModule."""

from lit_zero.pipeline.policy import Pipeline

__all__ = ["Pipeline"]
