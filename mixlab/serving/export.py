"""A model for other runtimes: plain conversion to ONNX and OpenVINO, with a free batch axis.

Both need their extra (`pip install 'mixlab[export]'`, `'mixlab[openvino]'`). The result is compared with the model by
whoever asks for it; here nothing is measured.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixlab.errors import UsageError


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks a lot; what goes wrong comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def to_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write `model` as one ONNX file: input `image` (batch, ...) float32, output `logits`; example: a few images."""
    if not _has("onnxscript"):
        raise UsageError("ONNX export needs onnx and onnxscript", hint="pip install 'mixlab[export]'")
    with _quiet():
        torch.onnx.export(
            model.eval(),
            (example,),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={_first_argument(model): {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def to_openvino(model: nn.Module, example: Tensor) -> Any:
    """`model` as an OpenVINO model with a free batch axis."""
    if not _has("openvino"):
        raise UsageError("this needs openvino", hint="pip install 'mixlab[openvino]'")
    import openvino

    with _quiet():
        batch = {_first_argument(model): {0: torch.export.Dim("batch")}}
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=batch)
        converted = openvino.convert_model(exported)
        converted.reshape([-1, *example.shape[1:]])
    return converted


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _first_argument(model: nn.Module) -> str:
    import inspect

    return next(iter(inspect.signature(model.forward).parameters))
