"""gross_ray: the grouped-convolution version of a trained convnet that is most accurate within your budget."""

from gross_ray.btd.block_terms import BlockTerms, BTDStatus
from gross_ray.btd.bottleneck import Bottleneck
from gross_ray.btd.expansion import expand_grouped_weight
from gross_ray.btd.options import BTDOptions
from gross_ray.btd.solver import block_term_decomposition
from gross_ray.data.images import load_dataset
from gross_ray.data.options import DataOptions
from gross_ray.errors import GrossRayError
from gross_ray.experiment import Experiment
from gross_ray.export import export_onnx
from gross_ray.presets import preset
from gross_ray.run.store import read_table
from gross_ray.search.cost import configuration_macs, count_macs
from gross_ray.search.evaluator import evaluate_configurations
from gross_ray.search.folding import fold
from gross_ray.space import Configuration, SearchSpace
from gross_ray.supernet.build import decompose_model
from gross_ray.supernet.configure import extract, set_configuration
from gross_ray.supernet.layers import LayerChoice, choice_of
from gross_ray.supernet.series import SeriesConv2d
from gross_ray.training.options import Schedule
from gross_ray.training.sampling import sampling_probabilities
from gross_ray.training.stages import response_error
from gross_ray.weights import load_weights

__version__ = "0.1.0"

__all__ = [
    "BTDOptions",
    "BTDStatus",
    "BlockTerms",
    "Bottleneck",
    "Configuration",
    "DataOptions",
    "Experiment",
    "GrossRayError",
    "LayerChoice",
    "Schedule",
    "SearchSpace",
    "SeriesConv2d",
    "block_term_decomposition",
    "choice_of",
    "configuration_macs",
    "count_macs",
    "decompose_model",
    "evaluate_configurations",
    "expand_grouped_weight",
    "export_onnx",
    "extract",
    "fold",
    "load_dataset",
    "load_weights",
    "preset",
    "read_table",
    "response_error",
    "sampling_probabilities",
    "set_configuration",
]
