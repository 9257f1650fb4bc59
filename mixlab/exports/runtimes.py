"""Models in other runtimes: written for ONNX, OpenVINO and torch.export, and opened again.

ONNX and OpenVINO need their extra (`export`, `openvino` of pyproject.toml).
"""

import contextlib
import inspect
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixlab.errors import UsageError
from mixlab.words import install_hint

METADATA_KEY = "mixlab"
OUTPUT = "logits"
_TRACES = ("stack_trace", "source_fn_stack", "from_node", "unflatten_path", "nn_module_stack_file")
Runner = Callable[[np.ndarray], np.ndarray]
Free = dict[int, Any]  # axes that a graph leaves open


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters talk a lot; what goes wrong comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def to_onnx(
    model: nn.Module, example: Tensor, path: Path, name: str = "image", free: Free | None = None
) -> None:
    """Write `model` as one ONNX file: input `name`, like `example`, output `logits`. free: None frees the batch."""
    _need("onnxscript", "onnx and onnxscript", "export")
    free = {0: torch.export.Dim("batch")} if free is None else free
    with quiet():
        torch.onnx.export(
            model.eval(),
            (example,),
            str(path),
            input_names=[name],
            output_names=[OUTPUT],
            dynamic_shapes={_first_argument(model): free} if free else None,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def to_openvino(model: nn.Module, example: Tensor, free: Free | None = None) -> Any:
    """`model` as an OpenVINO model. free: as for `to_onnx`."""
    _need("openvino", "openvino", "openvino")
    import openvino

    free = {0: torch.export.Dim("batch")} if free is None else free
    with quiet():
        converted = openvino.convert_model(_exported(model, example, free))
        converted.reshape([-1 if axis in free else length for axis, length in enumerate(example.shape)])
    return converted


def _exported(model: nn.Module, example: Tensor, free: Free) -> torch.export.ExportedProgram:
    shapes = {_first_argument(model): free} if free else None
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _TRACES:
                node.meta.pop(key, None)
    return program


def _write_onnx(graph: nn.Module, example: Tensor, path: Path, name: str, free: Free, about: str) -> None:
    to_onnx(graph, example, path, name, free)
    import onnx

    written = onnx.load(path)
    _forget_traces(written)
    onnx.helper.set_model_props(written, {METADATA_KEY: about} | plain_metadata(json.loads(about)))
    onnx.save(written, path)


def plain_metadata(about: dict[str, Any]) -> dict[str, str]:
    """What other programs look for, key by key: of `about`, which stands whole under METADATA_KEY."""
    given = about["preprocess"]
    found = {
        "model": about["model"],
        "class_names": json.dumps(about["class_names"], ensure_ascii=False),
        "version": about["written_by"].removeprefix("mixlab "),
    }
    if "image_size" in given:
        found |= {"input_size": json.dumps(given["image_size"])}
        found |= {key: json.dumps(given[key]) for key in ("mean", "std")}
        found["normalisation"] = "inside the graph: it takes uint8 pixels and applies mean and std itself"
    return found


def _forget_traces(message: Any) -> None:
    """Take the notes of torch's exporter out of an ONNX model: lines and places of the code that it came from."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None and field.name not in ("initializer", "opset_import"):
            for inner in (value,) if hasattr(value, "ListFields") else value:
                _forget_traces(inner)


def _write_openvino(graph: nn.Module, example: Tensor, path: Path, name: str, free: Free, about: str) -> None:
    converted = to_openvino(graph, example, free)
    import openvino

    converted.inputs[0].get_tensor().set_names({name})
    converted.outputs[0].get_tensor().set_names({OUTPUT})
    converted.set_rt_info(about, [METADATA_KEY])
    path.mkdir()
    openvino.save_model(converted, path / "model.xml", compress_to_fp16=False)


def _write_torch(graph: nn.Module, example: Tensor, path: Path, name: str, free: Free, about: str) -> None:
    content = io.BytesIO()
    with quiet():
        torch.export.save(_exported(graph, example, free), content, extra_files={METADATA_KEY: about})
    path.write_bytes(content.getvalue())


def _open_onnx(path: Path) -> Runner:
    _need("onnxruntime", "onnxruntime", "export")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: np.asarray(session.run([OUTPUT], {name: pixels})[0])


def _open_openvino(path: Path) -> Runner:
    import openvino

    # Where the processor has bf16, it would be the default.
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path / "model.xml", "CPU", precise)
    return lambda pixels: np.asarray(compiled(pixels)[0])


def _open_torch(path: Path) -> Runner:
    with quiet():
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(np.ascontiguousarray(pixels))).numpy())

    return run


WRITERS = {"onnx": _write_onnx, "openvino": _write_openvino, "torch-export": _write_torch}
OPENERS: dict[str, Callable[[Path], Runner]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "torch-export": _open_torch,
}


def _need(module: str, what: str, extra: str) -> None:
    if find_spec(module) is None:
        raise UsageError(f"this needs {what}", hint=install_hint(extra))


def _first_argument(model: nn.Module) -> str:
    return next(iter(inspect.signature(model.forward).parameters))
