"""What `mixlab bench` compares: the same model, weights and GELU as others run it.

A backend is a function from a model to a callable: images (B, channels, H, W), float32 on the CPU, to logits (B, K),
or for training to the loss of one step of AdamW on the cross-entropy.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.checkpoint.layouts import LAYOUTS
from mixlab.cpu.cores import Cores
from mixlab.cpu.inference import fast
from mixlab.cpu.passes import is_plain
from mixlab.errors import UsageError
from mixlab.models.catalog import MIXER, config_of, create_model, family_of

Call = Callable[[Tensor], Tensor]
BACKENDS = ("mixlab", "eager", "timm", "timm-compile", "onnxruntime", "onnxruntime-int8", "openvino", "jax")
ROUGH = ("onnxruntime-int8",)  # compute something else, on purpose
TRAINING_BACKENDS = ("mixlab", "eager", "timm", "timm-compile", "jax")
NUM_CLASSES = 1000
TIMM_GELU = {"tanh": "tanh", "erf": "none"}  # our name of an activation -> torch's form of GELU
LEARNING_RATE = 1e-4


def build_model(name: str, image_size: tuple[int, int], **options: Any) -> nn.Module:
    """The same weights in every process, with a head that is not zero: zeros would agree with anything."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=NUM_CLASSES, image_size=image_size, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.05)
    return model


def timm_twin(model: nn.Module) -> nn.Module:
    """timm's own class with the same weights and the same GELU."""
    from timm.models.mlp_mixer import MlpMixer

    config = config_of(model)
    if config is None:
        return model  # timm's already
    if family_of(model, exactly=True) is not MIXER or config.gelu not in TIMM_GELU:
        raise UsageError("timm has no model like this one", where="--against", hint="compare with eager")
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
        act_layer=partial(nn.GELU, approximate=TIMM_GELU[config.gelu]),
    )
    keys = LAYOUTS["timm"].keys(config.num_blocks)
    twin.load_state_dict({keys[name]: tensor for name, tensor in model.state_dict().items()})
    return twin.eval()


def inference(
    backend: str, model: nn.Module, example: Tensor, threads: int, official_code: Path | None = None
) -> Call:
    """The callable of a backend, not warm yet. official_code: a checkout of the authors', for `jax`."""
    if backend == "mixlab":
        return fast(model)
    if backend == "eager":
        return model
    if backend.startswith("timm"):
        twin = timm_twin(model)
        return torch.compile(twin) if backend == "timm-compile" else twin
    if backend == "jax":
        return _jax_inference(model, official_code)
    if backend == "openvino":
        return _openvino(model, example, threads)
    return _onnxruntime(model, example, threads, is_int8=backend == "onnxruntime-int8")


def _onnxruntime(model: nn.Module, example: Tensor, threads: int, *, is_int8: bool) -> Call:
    """is_int8: all products in 8 bits, ranges from `example`."""
    from mixlab.exports.int8 import all_products, run_session
    from mixlab.exports.runtimes import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(model, example, path)
        content = all_products(path, example.numpy(), "image") if is_int8 else path.read_bytes()
    runner = run_session(content, threads)
    return lambda image: torch.from_numpy(runner(image.numpy()))


def _openvino(model: nn.Module, example: Tensor, threads: int) -> Call:
    import openvino

    from mixlab.exports.runtimes import to_openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(to_openvino(model, example), "CPU", settings)
    return lambda image: torch.from_numpy(compiled(image.numpy())[0])


def training(backend: str, model: nn.Module, official_code: Path | None = None) -> Call:
    """A training step of a backend: forward, backward, AdamW; the class of image i is i."""
    if backend == "jax":
        return _jax_training(model, official_code)
    model = timm_twin(model) if backend.startswith("timm") else model
    model.train()
    forward = torch.compile(model) if backend.endswith("compile") else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=backend == "mixlab")
    cores = Cores(model) if backend == "mixlab" and is_plain(model) else None

    def step(image: Tensor) -> Tensor:
        target = F.one_hot(torch.arange(len(image)) % NUM_CLASSES, NUM_CLASSES).float()
        optimizer.zero_grad(set_to_none=True)
        if cores is None:
            loss = F.cross_entropy(forward(image), target)
            loss.backward()
        else:
            loss, _ = cores.backward(image, target, F.cross_entropy)
        optimizer.step()
        return loss.detach()

    return step


def _official(model: nn.Module, code: Path | None) -> tuple[Any, dict[str, Any]]:
    """The authors' module and its parameters."""
    config = config_of(model)
    if config is None or family_of(model, exactly=True) is not MIXER or config.gelu != "tanh":
        raise UsageError("the authors' code has plain Mixers with the tanh GELU only", where="--against jax")
    path = Path(code or ".") / "vit_jax" / "models_mixer.py"
    if code is None or not path.is_file():
        raise UsageError(
            "the authors' code is needed",
            where=str(path),
            hint="--official-code DIR, a checkout of google-research/vision_transformer; pip install jax flax einops",
        )
    spec = importlib.util.spec_from_file_location("official_mixer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import jax
    import numpy as np

    patches = type("Patches", (), {"size": (config.patch_size, config.patch_size)})
    network = module.MlpMixer(
        patches=patches,
        num_classes=config.num_classes,
        num_blocks=config.num_blocks,
        hidden_dim=config.hidden_dim,
        tokens_mlp_dim=config.token_mlp_dim,
        channels_mlp_dim=config.channel_mlp_dim,
    )
    layout = LAYOUTS["official"]
    parameters: dict[str, Any] = {}
    for ours, theirs in layout.keys(config.num_blocks).items():
        *folders, leaf = theirs.split("/")
        inner = parameters
        for folder in folders:
            inner = inner.setdefault(folder, {})
        array = layout.to_theirs(ours, model.state_dict()[ours]).detach().numpy()
        inner[leaf] = jax.numpy.asarray(np.ascontiguousarray(array))
    return network, parameters


def _channels_last(image: Tensor) -> Any:
    """Their order of axes; only once for the same images, which the timing then leaves out."""
    import jax

    if not _seen or _seen[0] is not image:
        _seen[:] = [image, jax.numpy.asarray(image.permute(0, 2, 3, 1).contiguous().numpy())]
    return _seen[1]


_seen: list[Any] = []


def _jax_inference(model: nn.Module, code: Path | None) -> Call:
    network, parameters = _official(model, code)
    import jax
    import numpy as np

    forward = jax.jit(lambda tree, image: network.apply({"params": tree}, image, train=False))
    return lambda image: torch.from_numpy(np.array(forward(parameters, _channels_last(image))))


def _jax_training(model: nn.Module, code: Path | None) -> Call:
    network, parameters = _official(model, code)
    import jax
    import optax

    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)  # torch's default

    def loss_of(tree: Any, image: Any) -> Any:
        logits = network.apply({"params": tree}, image, train=True)
        labels = jax.numpy.arange(len(image)) % NUM_CLASSES
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(tree: Any, state: Any, image: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(tree, image)
        changes, state = optimizer.update(gradients, state, tree)
        return optax.apply_updates(tree, changes), state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))
    held = [parameters, optimizer.init(parameters)]

    def step(image: Tensor) -> Tensor:
        held[0], held[1], loss = compiled(*held, _channels_last(image))
        return torch.tensor(float(loss))

    return step
