"""Hydra launcher: the runs of a sweep as processes of their own.

Hydra looks for plugins in packages of this name alone; the work is in `masksl.sweep`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ProcessLauncher(Launcher):
    """Runs ``jobs`` processes at a time; what was finished before is not repeated.

    Parameters
    ----------
    jobs : int
        Processes at a time.
    minutes : float | None
        After so many no run is begun, and those at work are interrupted.
    once : Mapping[str, str]
        A key by an override: of runs with the override that differ in the value of this
        key alone, only the first is run.
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
        """Take what Hydra knows of the sweep."""
        del task_function
        self._config, self._context = config, hydra_context

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a sweep; exits with status 1 where a run fails."""
        # Imported here: Hydra imports this module in every run.
        # pylint: disable-next=import-outside-toplevel
        from masksl import sweep

        del initial_job_idx
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        assert self._context is not None
        hydra_overrides = list(self._config.hydra.overrides.hydra)
        folder = Path(self._config.hydra.sweep.dir).absolute()
        jobs = []
        for each in self._chosen(job_overrides):
            overrides = [*each, "resume=auto"]
            composed = self._context.config_loader.load_sweep_config(
                self._config, overrides
            )
            name = composed.hydra.sweep.subdir
            ours = [str(key) for key in composed if key != "hydra"]
            composed = OmegaConf.masked_copy(composed, ours)
            arguments = [*hydra_overrides, *overrides]
            jobs.append(sweep.Job(name, composed, arguments, folder / name))
        sweep.run(jobs, folder, self._jobs, self._minutes)
        return []

    def _chosen(self, sweep: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
        """Yield the overrides of the runs, without those that ``once`` leaves out."""
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
