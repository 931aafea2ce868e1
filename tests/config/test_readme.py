"""The Hydra app of the README, as it stands there."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tests.config.support import APPS, run

README = Path(__file__).parents[2] / "README.md"
APP = f"""
    import sys

    sys.path.insert(0, {str(APPS)!r})

    import hydra
    from hydra.utils import instantiate
    from tiny import Tiny, data

    import lit_zero


    @hydra.main(version_base="1.3", config_path=".", config_name="config")
    def app(cfg):
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = instantiate(cfg.trainer, max_steps=2, **quiet)
        trainer.fit(Tiny(), data())
        if trainer.is_global_zero:
            print(f"trained {{trainer.global_step}} steps of {{trainer.strategy.zero.stage}} on {{trainer.world_size}}")


    if __name__ == "__main__":
        app()
"""


def test_the_hydra_app_runs(tmp_path: Path) -> None:
    lines = README.read_text().splitlines()
    first = lines.index("    # config.yaml")
    last = next(number for number in range(first, len(lines)) if lines[number] and not lines[number].startswith(" "))
    (tmp_path / "config.yaml").write_text(textwrap.dedent("\n".join(lines[first:last])))
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    done = run(tmp_path / "app.py", cwd=tmp_path)
    assert done.code == 0, done.output
    assert "trained 2 steps of stage3 on 2" in done.output
