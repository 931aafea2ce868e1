"""Where the shards of a rank live between uses: on the device, in host memory, or in files."""

from lit_zero.offload.policy import Offload

__all__ = ["Offload"]
