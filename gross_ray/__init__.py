"""gross_ray finds the most accurate grouped-convolution version of a trained convnet within your budget.

Public names are loaded at their first use (PEP 562): `import gross_ray` alone loads neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gross_ray.version import VERSION

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports the same names
    from gross_ray.btd.block_terms import BlockTerms as BlockTerms
    from gross_ray.btd.block_terms import BTDStatus as BTDStatus
    from gross_ray.btd.bottleneck import Bottleneck as Bottleneck
    from gross_ray.btd.expansion import expand_grouped_weight as expand_grouped_weight
    from gross_ray.btd.options import BTDOptions as BTDOptions
    from gross_ray.btd.solver import block_term_decomposition as block_term_decomposition
    from gross_ray.compression import Compressed as Compressed
    from gross_ray.compression import compress as compress
    from gross_ray.data.images import load_dataset as load_dataset
    from gross_ray.data.options import DataOptions as DataOptions
    from gross_ray.errors import GrossRayError as GrossRayError
    from gross_ray.experiment import Experiment as Experiment
    from gross_ray.export import export_onnx as export_onnx
    from gross_ray.presets import preset as preset
    from gross_ray.run.store import read_table as read_table
    from gross_ray.search.cost import configuration_macs as configuration_macs
    from gross_ray.search.cost import count_macs as count_macs
    from gross_ray.search.evaluator import evaluate_configurations as evaluate_configurations
    from gross_ray.search.folding import fold as fold
    from gross_ray.space import Configuration as Configuration
    from gross_ray.space import SearchSpace as SearchSpace
    from gross_ray.supernet.build import decompose_model as decompose_model
    from gross_ray.supernet.configure import extract as extract
    from gross_ray.supernet.configure import set_configuration as set_configuration
    from gross_ray.supernet.layers import LayerChoice as LayerChoice
    from gross_ray.supernet.layers import choice_of as choice_of
    from gross_ray.supernet.series import SeriesConv2d as SeriesConv2d
    from gross_ray.training.options import Schedule as Schedule
    from gross_ray.training.sampling import sampling_probabilities as sampling_probabilities
    from gross_ray.training.stages import response_error as response_error
    from gross_ray.weights import load_weights as load_weights

__version__ = VERSION

_MODULES = {
    "BTDOptions": "gross_ray.btd.options",
    "BTDStatus": "gross_ray.btd.block_terms",
    "BlockTerms": "gross_ray.btd.block_terms",
    "Bottleneck": "gross_ray.btd.bottleneck",
    "Compressed": "gross_ray.compression",
    "Configuration": "gross_ray.space",
    "DataOptions": "gross_ray.data.options",
    "Experiment": "gross_ray.experiment",
    "GrossRayError": "gross_ray.errors",
    "LayerChoice": "gross_ray.supernet.layers",
    "Schedule": "gross_ray.training.options",
    "SearchSpace": "gross_ray.space",
    "SeriesConv2d": "gross_ray.supernet.series",
    "block_term_decomposition": "gross_ray.btd.solver",
    "choice_of": "gross_ray.supernet.layers",
    "compress": "gross_ray.compression",
    "configuration_macs": "gross_ray.search.cost",
    "count_macs": "gross_ray.search.cost",
    "decompose_model": "gross_ray.supernet.build",
    "evaluate_configurations": "gross_ray.search.evaluator",
    "expand_grouped_weight": "gross_ray.btd.expansion",
    "export_onnx": "gross_ray.export",
    "extract": "gross_ray.supernet.configure",
    "fold": "gross_ray.search.folding",
    "load_dataset": "gross_ray.data.images",
    "load_weights": "gross_ray.weights",
    "preset": "gross_ray.presets",
    "read_table": "gross_ray.run.store",
    "response_error": "gross_ray.training.stages",
    "sampling_probabilities": "gross_ray.training.sampling",
    "set_configuration": "gross_ray.supernet.configure",
}
"""The module that defines each public name, as in the imports above (a test compares them)."""
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
