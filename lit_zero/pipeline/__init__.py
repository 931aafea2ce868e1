"""Pipeline stages for an unmodified LightningModule."""
