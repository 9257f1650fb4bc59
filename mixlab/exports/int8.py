"""An ONNX model with 8-bit products: `mixlab export --int8`.

ONNX Runtime's static quantisation (QDQ), ranges from calibration images, int8 weights by channel. Each product's
own damage is measured first; if all of them together cost too much accuracy, the worst go back to float32 one by one.
"""

import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.errors import MixlabError, UsageError
from mixlab.exports.runtimes import OUTPUT, Runner, quiet
from mixlab.files import written_whole

PRODUCTS = ("MatMul", "Gemm", "Conv")
NUM_CALIBRATION, CALIBRATION_BATCH = 512, 64
PERCENTILE = 99.99
MAX_LOSS = 0.003  # of accuracy on the images that the choice is made on
SPEED_BATCH, SPEED_ROUNDS = 16, 7


def quantise(
    source: Path, destination: Path, calibration: np.ndarray, labels: np.ndarray, *, threads: int
) -> dict[str, Any]:
    """Write `source`, an ONNX file of `export`, with 8-bit products to `destination`.

    calibration: uint8 (n, height, width, channels), images that ranges are taken and products chosen on; labels:
    int (n,) of them. Returns the accuracy on them before and after, and a row for each product.
    """
    import onnx

    model = onnx.load(source)
    names = _products(model)
    if not names:
        raise UsageError("there is no product to quantise in this model", where=str(source))
    ranges = _ranges(source, _batches(calibration[:NUM_CALIBRATION], model.graph.input[0].name))
    before = run_session(source.read_bytes(), threads)
    exact = _logits(before, calibration)
    top1 = _accuracy(exact, labels)
    sample, expected = calibration[:128], exact[:128]
    rows = []
    for name in names:
        found = _logits(run_session(_quantised(model, ranges, [name]), threads), sample)
        noise = float(np.square(found - expected).mean())
        rows.append({"product": name, "relative_error": (noise / float(np.square(expected).mean())) ** 0.5})
    worst_first = sorted(rows, key=lambda row: -float(row["relative_error"]))
    kept_exact: list[str] = []
    while True:
        chosen = [name for name in names if name not in kept_exact]
        if not chosen:
            raise MixlabError(
                f"8-bit products cost more than {100 * MAX_LOSS:.1f} points of accuracy, whichever are taken",
                where=str(source),
                hint="leave --int8 out",
            )
        content = _quantised(model, ranges, chosen)
        after = _accuracy(_logits(run_session(content, threads), calibration), labels)
        if top1 - after <= MAX_LOSS:
            break
        kept_exact.append(str(worst_first[len(kept_exact)]["product"]))
    for row in rows:
        row["is_int8"] = row["product"] not in kept_exact
    with written_whole(destination) as temporary:
        temporary.write_bytes(content)
    return {
        "num_calibration": len(calibration), "top1_before": top1, "top1_after": after, "products": worst_first,
        "num_int8": len(chosen), "num_float32": len(kept_exact),
    }  # fmt: skip


def all_products(source: Path, values: np.ndarray, name: str) -> bytes:
    """Any ONNX file with every product in 8 bits, ranges from `values`, what goes into its input `name`."""
    import onnx

    model = onnx.load(source)
    return _quantised(model, _ranges(source, _batches(values, name)), _products(model))


def compare_speed(first: Path, second: Path, pixels: np.ndarray, threads: int) -> float:
    """How many times faster `second` is than `first`, in turns: the median ratio."""
    works = [run_session(path.read_bytes(), threads) for path in (first, second)]
    batch, ratios = np.resize(pixels, (SPEED_BATCH, *pixels.shape[1:])), []
    for number in range(SPEED_ROUNDS + 1):
        times = []
        for work in works:
            began = time.perf_counter()
            work(batch)
            times.append(time.perf_counter() - began)
        if number:
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def accuracy_of(path: Path, pixels: np.ndarray, labels: np.ndarray, threads: int) -> float:
    """Share of images uint8 (n, height, width, channels) whose label an exported ONNX model says."""
    return _accuracy(_logits(run_session(path.read_bytes(), threads), pixels), labels)


def run_session(content: bytes, threads: int) -> Runner:
    """An ONNX model with one input in ONNX Runtime on so many cores: what it takes in, logits out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run([OUTPUT], {session.get_inputs()[0].name: pixels})[0])


def _products(model: Any) -> list[str]:
    """The names of an ONNX model's products."""
    return [node.name for node in model.graph.node if node.op_type in PRODUCTS]


def _logits(runner: Runner, pixels: np.ndarray) -> np.ndarray:
    parts = [runner(pixels[i : i + CALIBRATION_BATCH]) for i in range(0, len(pixels), CALIBRATION_BATCH)]
    return np.concatenate(parts)


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def _batches(values: np.ndarray, name: str) -> list[dict[str, np.ndarray]]:
    size = min(CALIBRATION_BATCH, len(values))  # all of one size: they are put together to arrays
    return [{name: values[i : i + size]} for i in range(0, len(values) // size * size, size)]


class _Reader:
    """What ONNX Runtime's calibration reads."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches = list(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.batches.pop(0) if self.batches else None


def _ranges(source: Path, batches: list[dict[str, np.ndarray]]) -> Any:
    """The range of every tensor that goes into a product, outliers left out."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    with written_whole(source.with_name(f"{source.stem}_augmented.onnx")) as temporary:
        calibrator = create_calibrator(
            source,
            op_types_to_calibrate=list(PRODUCTS),
            augmented_model_path=str(temporary),
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"percentile": PERCENTILE},
        )
        calibrator.set_execution_providers(["CPUExecutionProvider"])
        with quiet():
            calibrator.collect_data(_Reader(batches))
            found = calibrator.compute_data()
    source.with_name(f"{source.stem}_augmented.onnx").unlink(missing_ok=True)
    return found


def _quantised(model: Any, ranges: Any, names: Sequence[str]) -> bytes:
    """The model with 8-bit products of these names."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    quantizer = QDQQuantizer(
        copy.deepcopy(model),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=list(names),
        nodes_to_exclude=[],
        op_types_to_quantize=list(PRODUCTS),
        extra_options={},
    )
    quantizer.quantize_model()
    written = quantizer.model.model
    kept = {prop.key for prop in written.metadata_props}
    for prop in model.metadata_props:
        if prop.key not in kept:
            written.metadata_props.add(key=prop.key, value=prop.value)
    content: bytes = written.SerializeToString()
    return content
