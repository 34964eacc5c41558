"""Hydra launcher that runs the jobs of a sweep as separate processes.

Hydra searches for plugins only in packages called ``hydra_plugins``. The implementation
is in `masksl.sweep`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ProcessLauncher(Launcher):
    """Launcher that runs ``jobs`` processes at the same time and skips finished runs.

    Parameters
    ----------
    jobs : int
        Number of processes at the same time.
    minutes : float | None
        Time limit. After it no run is started and the running ones are interrupted.
    once : Mapping[str, str]
        Keys by override. Among the runs that have the override and differ only in the
        value of the key, only the first is run.
    """

    def __init__(
        self, jobs: int, minutes: float | None, once: Mapping[str, str]
    ) -> None:
        self._jobs, self._minutes, self._once = jobs, minutes, dict(once)
        self._config = DictConfig({})
        self._context: HydraContext | None = None

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        """Keep the configuration of the sweep and the context that composes its
        runs."""
        del task_function
        self._config, self._context = config, hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a sweep; see `masksl.sweep.run` for how it ends."""
        # Imported here: Hydra imports this module in every run.
        # pylint: disable-next=import-outside-toplevel
        from masksl import cli, sweep

        del initial_job_idx
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        assert self._context is not None
        hydra_overrides = list(self._config.hydra.overrides.hydra)
        folder = Path(self._config.hydra.sweep.dir).absolute()
        jobs = []
        for chosen in self._chosen(job_overrides):
            overrides = [*chosen, "resume=auto"]
            composed = self._context.config_loader.load_sweep_config(
                self._config, overrides
            )
            name = composed.hydra.sweep.subdir
            keys = [str(key) for key in composed if key != "hydra"]
            composed = OmegaConf.masked_copy(composed, keys)
            arguments = [*hydra_overrides, *overrides]
            jobs.append(sweep.Job(name, composed, arguments, folder / name))
        with cli.in_one_line():
            sweep.run(jobs, folder, self._jobs, self._minutes)
        return []

    def _chosen(self, sweep: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
        """Yield the overrides of the runs that ``once`` does not exclude."""
        seen: set[frozenset[str]] = set()
        for overrides in sweep:
            for override, key in self._once.items():
                if override in overrides:
                    rest = frozenset(
                        o for o in overrides if not o.startswith(f"{key}=")
                    )
                    if rest in seen:
                        break
                    seen.add(rest)
            else:
                yield overrides
