"""The two ways in which kernels run."""

from tests.kernels.conftest import compiled, interpreted

__all__ = ["compiled", "interpreted"]
