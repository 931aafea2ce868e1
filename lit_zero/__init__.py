"""lit_zero: ZeRO for PyTorch Lightning, by changing one word.

Importing the package registers the strategies ``zero0`` to ``zero3`` (and ``zero3_spawn``, ...) with Lightning and the
config groups of ``lit_zero.conf`` with Hydra.
"""

from lit_zero import optim
from lit_zero._version import __version__
from lit_zero.activation import Activation
from lit_zero.checkpoint import Checkpoint
from lit_zero.comm import Comm
from lit_zero.config.search_path import register as _register_search_path
from lit_zero.layers import Layers
from lit_zero.offload import Offload
from lit_zero.pipeline import Pipeline
from lit_zero.precision import Precision
from lit_zero.strategy import ZeroStrategy, load_pretrained
from lit_zero.strategy.registry import register as _register_strategies
from lit_zero.zero import Zero

__all__ = [
    "Activation",
    "Checkpoint",
    "Comm",
    "Layers",
    "Offload",
    "Pipeline",
    "Precision",
    "Zero",
    "ZeroStrategy",
    "__version__",
    "load_pretrained",
    "optim",
]

_register_strategies()
_register_search_path()
