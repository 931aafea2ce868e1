"""The Hydra plugin that adds lit_zero's groups to the search path. Imports Hydra; see ``search_path`` for when."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lit_zero.config import jobs

CONF = "pkg://lit_zero.conf"


class LitZeroSearchPath(SearchPathPlugin):
    """Append ``pkg://lit_zero.conf``: an app's own groups of the same name come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra when an app starts."""
        if all(element.path != CONF for element in search_path.get_path()):
            search_path.append("lit_zero", CONF)
        # The one moment at which the command line is certainly this app's: a launcher plugin may run the jobs in
        # worker processes whose command line is the worker's, and the ranks of a job are started from there.
        jobs.remember_program()
