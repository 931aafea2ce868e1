"""The two ways in which kernels run, and what counts their launches."""

from tests.kernels.conftest import compiled, interpreted
from tests.optim.owed import counts

__all__ = ["compiled", "counts", "interpreted"]
