"""Pipeline stages: how a model is divided into them, and in which order micro-batches run through them."""
