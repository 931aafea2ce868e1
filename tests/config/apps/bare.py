"""A Hydra app that never mentions lit_zero; its root config names ``pkg://lit_zero.conf`` as a search path."""

from __future__ import annotations

import json

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="bare")
def bare(cfg: DictConfig) -> None:
    print(json.dumps(OmegaConf.to_container(cfg)))


if __name__ == "__main__":
    bare()
