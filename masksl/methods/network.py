"""The network of a run, which clients and server build from its seed."""

from masksl import model
from masksl.dataset import DATASETS, Spec
from masksl.settings import RunConfig, Settings
from masksl.utils import derive_seed


def spec_of(settings: Settings) -> Spec:
    """Return what is known of the run's data set without its files."""
    return DATASETS[str(settings["dataset.name"])]


def initial_units(settings: Settings) -> model.Units:
    """Return the units of the run's network, with weights drawn by the run's seed."""
    name, spec = str(settings["model.name"]), spec_of(settings)
    seed = derive_seed(RunConfig.of(settings).seed, "model")
    return model.build(name, spec.classes, spec.channels, seed=seed)
