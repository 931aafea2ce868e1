"""The Hydra groups of lit_zero, installed as ``lit_zero.conf``.

On the command line: ``python examples/train.py zero=stage3 optimizer.lr=3e-4``.
"""
