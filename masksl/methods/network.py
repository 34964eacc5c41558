"""The network of a run, which clients and server build from its seed."""

from masksl import model
from masksl.dataset import DATASETS, Spec
from masksl.model import ModelConfig
from masksl.settings import RunConfig, Settings, read
from masksl.utils import derive_seed


def spec_of(settings: Settings) -> Spec:
    """Return what is known of the run's data set without its files."""
    return DATASETS[str(settings["dataset.name"])]


def initial_units(settings: Settings) -> model.Units:
    """Return the units of the run's network, with weights drawn by the run's seed."""
    config, spec = read(ModelConfig, settings, "model"), spec_of(settings)
    return model.build(
        *(config.name, spec.classes, spec.channels),
        seed=derive_seed(RunConfig.of(settings).seed, "model"),
        stem_stride=config.stem_stride,
    )
