"""ONNX models of a network's variants, each made from one export: exporting takes seconds, and a hundred are timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper, numpy_helper
from torch import Tensor, nn

from gross_ray.export import export_onnx
from gross_ray.search.forms import PARTS
from gross_ray.search.variants import Forms, Variants
from gross_ray.space import DENSE


def exported(network: nn.Module, input_shape: tuple[int, ...]) -> onnx.ModelProto:
    """Return what `export_onnx` writes; raises its errors."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        export_onnx(network, file, input_shape)
        return onnx.load(file)


class OnnxVariants:
    """The ONNX model of any variant: that of the full network with convolutions exchanged for bottlenecks.

    The exporter may have folded batch-norms into the convolutions that are exchanged. The bottlenecks' weights do not
    contain them: the time is that of the exported variant, the outputs are not.
    """

    def __init__(self, variants: Variants) -> None:
        """Export the full network, once."""
        self._variants = variants
        self._full = exported(variants.full, variants.input_shape)
        self._without_nodes = onnx.ModelProto()
        self._without_nodes.CopyFrom(self._full)
        del self._without_nodes.graph.node[:], self._without_nodes.graph.initializer[:]
        self._layer_of = {f"{name}.weight": name for name in variants.forms}

    @property
    def complete(self) -> bool:
        """Whether each call of each layer was found; the exporter may rename a weight, or pad before a convolution."""
        found = [self._layer(node) for node in self._full.graph.node]
        convs = {name: self._variants.form(name, DENSE) for name in self._variants.forms}
        return all(
            found.count(name) == self._variants.calls[name] and conv.padding_mode == "zeros"
            for name, conv in convs.items()
        )

    def model(self, forms: Forms) -> bytes:
        """Return the ONNX model of a variant."""
        chosen = dict(zip(self._variants.forms, forms, strict=True))
        model = onnx.ModelProto()
        model.CopyFrom(self._without_nodes)
        for node in self._full.graph.node:
            name = self._layer(node)
            if name is None or chosen[name] == DENSE:
                model.graph.node.append(node)
            else:
                model.graph.node.extend(_exchanged(node, name, self._variants.form(name, chosen[name])))
        model.graph.initializer.extend(self._initializers(chosen))
        return model.SerializeToString()

    def _layer(self, node: onnx.NodeProto) -> str | None:
        return self._layer_of.get(node.input[1]) if node.op_type == "Conv" else None

    def _initializers(self, chosen: dict[str, int]) -> Iterator[onnx.TensorProto]:
        exchanged = {f"{name}.weight" for name, size in chosen.items() if size != DENSE}
        yield from (tensor for tensor in self._full.graph.initializer if tensor.name not in exchanged)
        for name, size in chosen.items():
            if size != DENSE:
                for part, weight in _weights(self._variants.form(name, size)).items():
                    yield numpy_helper.from_array(weight.numpy(), f"{name}.{part}.weight")


def _weights(bottleneck: nn.Module) -> dict[str, Tensor]:
    return {part: bottleneck.get_parameter(f"{part}.weight").detach().cpu() for part in PARTS}


def _exchanged(node: onnx.NodeProto, name: str, bottleneck: nn.Module) -> list[onnx.NodeProto]:
    """Return the nodes of a bottleneck in place of a dense convolution, whose bias the last one adds."""
    (output,) = node.output
    between, after = f"{output}.pointwise_in", f"{output}.grouped"
    grouped = onnx.NodeProto()
    grouped.CopyFrom(node)
    del grouped.input[:], grouped.output[:]
    grouped.input.extend([between, f"{name}.grouped.weight"])
    grouped.output.extend([after])
    groups = bottleneck.get_submodule("grouped").groups
    kept = [attribute for attribute in node.attribute if attribute.name != "group"]
    del grouped.attribute[:]
    grouped.attribute.extend([*kept, helper.make_attribute("group", groups)])
    before = [node.input[0], f"{name}.pointwise_in.weight"]
    last = [after, f"{name}.pointwise_out.weight", *node.input[2:]]
    return [
        helper.make_node("Conv", before, [between], kernel_shape=[1, 1]),
        grouped,
        helper.make_node("Conv", last, [output], kernel_shape=[1, 1]),
    ]
