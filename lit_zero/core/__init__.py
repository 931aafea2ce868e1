"""Ground floor: words and integers. Nothing here calls torch.distributed or imports another part of lit_zero."""
