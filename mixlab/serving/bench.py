"""How fast a model is here, beside others that compute the same: each in a warm process of its own, taking turns.

A backend is a function from a model to a callable on images. The parent lets the processes run one after the other,
A B A B, so that a machine that slows down slows all of them; ratios are taken within a round.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from mixlab.device import keep_memory
from mixlab.errors import MixlabError, UsageError
from mixlab.models.catalog import create_model
from mixlab.models.cores import Cores
from mixlab.models.cost import measure_cost
from mixlab.models.fast import fast
from mixlab.models.fast_training import is_plain
from mixlab.models.mixer import Mixer

BACKENDS = ("mixlab", "eager", "timm", "timm-compile", "onnxruntime", "openvino")
TOLERANCE = 1e-4  # largest difference of a logit from the plain model's
GEMM_SIDE = 4096
SECONDS = 0.7  # of one turn, about


def _model(name: str, image_size: tuple[int, int]) -> Any:
    """The same weights in every process, with a head that is not zero: zeros would agree with anything."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=1000, image_size=image_size).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.05)
    return model


def _timm_twin(model: nn.Module) -> nn.Module:
    """timm's own class with the same weights and the same GELU."""
    from functools import partial

    from timm.models.mlp_mixer import MlpMixer

    from mixlab.checkpoint.layouts import LAYOUTS

    if not isinstance(model, Mixer):
        return model  # timm's already
    config = model.config
    ratios = tuple((dim + 0.5) / config.hidden_dim for dim in (config.token_mlp_dim, config.channel_mlp_dim))
    make: Any = MlpMixer
    twin: nn.Module = make(
        num_classes=config.num_classes,
        img_size=config.image_size,
        in_chans=config.in_channels,
        patch_size=config.patch_size,
        num_blocks=config.num_blocks,
        embed_dim=config.hidden_dim,
        mlp_ratio=ratios,
        act_layer=partial(nn.GELU, approximate=config.gelu if config.gelu == "tanh" else "none"),
    )
    keys = LAYOUTS["timm"].keys(config.num_blocks)
    twin.load_state_dict({keys[name]: tensor for name, tensor in model.state_dict().items()})
    return twin.eval()


def _onnxruntime(model: nn.Module, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    import tempfile
    from pathlib import Path

    import onnxruntime

    from mixlab.serving.export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(model, example, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _openvino(model: nn.Module, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    import openvino

    from mixlab.serving.export import to_openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(to_openvino(model, example), "CPU", settings)
    return lambda image: torch.from_numpy(compiled(image.numpy())[0])


def prepare(backend: str, model: nn.Module, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    """The callable of a backend, not warm yet."""
    if backend == "mixlab":
        return fast(model)
    if backend == "eager":
        return model
    if backend.startswith("timm"):
        twin = _timm_twin(model)
        return torch.compile(twin) if backend == "timm-compile" else twin
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[backend](model, example, threads)


def _training_step(backend: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """One step of AdamW on cross-entropy; of our model, or of timm's."""
    model = _timm_twin(model) if backend.startswith("timm") else model
    model.train()
    forward = torch.compile(model) if backend.endswith("compile") else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=backend == "mixlab")
    cores = Cores(model) if backend == "mixlab" and is_plain(model) else None

    def step(image: Tensor) -> Tensor:
        target = nn.functional.one_hot(torch.arange(len(image)) % 1000, 1000).float()
        optimizer.zero_grad(set_to_none=True)
        if cores is None:
            loss = nn.functional.cross_entropy(forward(image), target)
            loss.backward()
        else:
            loss, _ = cores.backward(image, target, lambda logits, part: _share(logits, part, len(image)))
        optimizer.step()
        return loss.detach()

    return step


def _share(logits: Tensor, target: Tensor, num_images: int) -> Tensor:
    """What a part of a batch has in its mean loss."""
    return len(target) / num_images * nn.functional.cross_entropy(logits, target)


def _serve(connection: Connection, job: dict[str, Any]) -> None:
    """One process: prepare, warm up, then time whenever the parent asks."""
    torch.set_num_threads(job["threads"])
    if job["backend"] == "mixlab":
        keep_memory()  # as mixlab's commands do; the others have their own defaults
    try:
        model = _model(job["model"], job["image_size"])
        image = torch.randn(
            job["batch_size"], 3, *job["image_size"], generator=torch.Generator().manual_seed(1)
        )
        if job["train"]:
            call = _training_step(job["backend"], model)
            logits = call(image)
            call(image)
        else:
            with torch.no_grad():
                call = prepare(
                    job["backend"],
                    model,
                    image if len(image) > 1 else image.repeat(2, 1, 1, 1),
                    job["threads"],
                )
                logits = call(image)
                for _ in range(2):
                    call(image)
        began = time.perf_counter()
        _run(call, image, 1, job["train"])
        count = max(round(SECONDS / (time.perf_counter() - began)), 1)
        connection.send(("ready", logits.numpy()))
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"[:300]))
        return
    while connection.recv() == "go":
        began = time.perf_counter()
        _run(call, image, count, job["train"])
        seconds = (time.perf_counter() - began) / count
        connection.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _run(call: Callable[[Tensor], Tensor], image: Tensor, count: int, train: bool) -> None:
    with torch.enable_grad() if train else torch.no_grad():
        for _ in range(count):
            call(image)


def gemm_flops(threads: int, repeats: int = 5) -> float:
    """The most floating-point operations a second of a 4096 x 4096 x 4096 product in float32, of several tries.

    By whichever of torch's two libraries is faster here: on an AMD processor with AVX-512, oneDNN by far.
    """
    torch.set_num_threads(threads)
    a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    products: list[Callable[[], Any]] = [lambda: torch.mm(a, b)]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(b, GEMM_SIDE)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    best = float("inf")
    for product in products * repeats:
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return 2 * GEMM_SIDE**3 / best


def bench(
    models: tuple[str, ...],
    against: tuple[str, ...],
    *,
    image_size: tuple[int, int],
    batch_size: int,
    threads: int,
    train: bool = False,
    rounds: int = 7,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A row for each model and backend: speed, share of the GEMM peak, and how many times faster `mixlab` is."""
    unknown = [name for name in against if name not in BACKENDS]
    if unknown:
        raise UsageError(f"there is no backend {unknown[0]!r}", where="--against", hint=", ".join(BACKENDS))
    rows = []
    for name in models:
        cost = measure_cost(_model(name, image_size), image_size)
        job = {
            "model": name, "image_size": image_size, "batch_size": batch_size, "threads": threads, "train": train,
        }  # fmt: skip
        backends = tuple(dict.fromkeys(("mixlab", *against)))
        seconds, memory, failures = _take_turns(job, backends, rounds, say)
        peak = gemm_flops(threads)
        for backend in backends:
            if backend in failures:
                rows.append({"model": name, "backend": backend, "error": failures[backend]})
                continue
            median = statistics.median(seconds[backend])
            flops = (3 if train else 1) * cost.flops * batch_size / median
            row: dict[str, Any] = {
                "model": name, "backend": backend, "mode": "train" if train else "inference",
                "batch_size": batch_size, "image_size": list(image_size), "threads": threads,
                "images_per_second": batch_size / median, "ms_per_batch": 1000 * median,
                "gflops": flops / 1e9, "peak_share": flops / peak, "peak_memory_bytes": memory[backend],
                "rounds": rounds,
            }  # fmt: skip
            if backend == "mixlab":
                ratios = {
                    other: sorted(b / a for a, b in zip(seconds["mixlab"], times, strict=True))
                    for other, times in seconds.items()
                    if other != "mixlab"
                }
                row["ratio"] = {other: statistics.median(values) for other, values in ratios.items()}
                row["ratio_range"] = {other: [values[0], values[-1]] for other, values in ratios.items()}
            rows.append(row)
    return rows


def _take_turns(
    job: dict[str, Any], backends: tuple[str, ...], rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    context = multiprocessing.get_context("spawn")
    processes: dict[str, Any] = {}
    logits: dict[str, Any] = {}
    failures: dict[str, str] = {}
    try:
        for backend in backends:  # one after the other: preparing at once would be slower for all
            say(f"preparing {job['model']} on {backend}")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job | {"backend": backend}), daemon=True)
            process.start()
            theirs.close()
            try:
                state, value = ours.recv()
            except EOFError:
                state, value = "failed", "its process ended"
            if state == "failed":
                failures[backend] = value
                process.join()
                continue
            logits[backend] = torch.from_numpy(value)
            processes[backend] = (process, ours)
        if "mixlab" not in processes:
            raise MixlabError(f"the model itself cannot be run: {failures['mixlab']}", where=job["model"])
        for backend, found in logits.items():
            difference = float((found - logits["mixlab"]).abs().max())
            if difference > TOLERANCE and not job["train"]:
                failures[backend] = f"its logits differ by {difference:.1e}"
        seconds: dict[str, list[float]] = {backend: [] for backend in processes if backend not in failures}
        memory: dict[str, int] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for backend in seconds:
                connection = processes[backend][1]
                connection.send("go")
                taken, memory[backend] = connection.recv()
                seconds[backend].append(taken)
        return seconds, memory, failures
    finally:
        for process, connection in processes.values():
            connection.send("end")
            process.join(10)
            if process.is_alive():
                process.kill()
