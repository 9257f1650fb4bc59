"""`mixlab doctor`: from facts of the machine to verdicts, each with what to do."""

from collections.abc import Callable
from typing import Any

from mixlab.words import install_hint

ENOUGH_MEMORY = 4 << 30  # bytes, for small images
# Extras: a module that each installs, and what it is for.
EXTRAS = {
    "export": ("onnxruntime", "mixlab export and package"),
    "serve": ("starlette", "mixlab serve and ui"),
    "openvino": ("openvino", "mixlab export --to openvino"),
    "hf": ("datasets", "data sets hf:NAME"),
    "shards": ("webdataset", "tar shards read by other programs"),
    "heic": ("pillow_heif", "images of phones, HEIC"),
    "audio": ("soundfile", "sound files"),
    "tensorboard": ("tensorboard", "curves in TensorBoard"),
    "wandb": ("wandb", "curves in Weights & Biases"),
}


def verdicts(facts: dict[str, Any], has: Callable[[str], bool]) -> list[dict[str, str]]:
    """A row {what, verdict, found, advice} for each thing: ok, slow or missing; advice is empty where all is well.

    facts: those of `mixlab doctor --json`. has: whether a module is installed.
    """
    rows = [*_machine(facts), *_speed(facts)]
    for extra, (module, purpose) in EXTRAS.items():
        is_there = has(module)
        advice = "" if is_there else f"for {purpose}, {install_hint(extra)}"
        rows.append(_row(f"extra {extra}", is_there, "missing", purpose, advice))
    return rows


def _row(what: str, is_ok: bool, else_verdict: str, found: object, advice: str) -> dict[str, str]:
    verdict = "ok" if is_ok else else_verdict
    return {"what": what, "verdict": verdict, "found": str(found), "advice": "" if is_ok else advice}


def _machine(facts: dict[str, Any]) -> list[dict[str, str]]:
    versions, memory = facts["versions"], facts["memory_bytes"]
    absent = [name for name, version in versions.items() if version is None]
    has_gpu = facts["device"] != "cpu"
    gpu = facts["cuda"] or ("Apple's, by mps" if facts["mps"] else "none")
    return [
        _row("python", True, "", f"{facts['python']}, {facts['platform']}", ""),
        _row(
            "packages",
            not absent,
            "missing",
            ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
            f"pip install {' '.join(absent)}",
        ),
        _row(
            "GPU",
            has_gpu,
            "missing",
            gpu,
            "none that torch can use: small images train well on the processor, photos at 224 pixels take long",
        ),
        _row(
            "processor", True, "", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads", ""
        ),
        _row(
            "memory",
            memory >= ENOUGH_MEMORY,
            "slow",
            f"{memory / 2**30:.1f} GiB",
            "little: a smaller --batch-size or --accumulate 4 takes less",
        ),
    ]


def _speed(facts: dict[str, Any]) -> list[dict[str, str]]:
    wide = facts["cpu_capability"] not in ("DEFAULT", "NO AVX")
    has_programs = str(facts["programs_for_cores"]).startswith("begin in")
    return [
        _row(
            "vector instructions",
            wide,
            "slow",
            facts["cpu_capability"],
            "torch uses none here: see that ATEN_CPU_CAPABILITY is not set, and that torch is for this processor",
        ),
        _row(
            "bfloat16",
            facts["bf16_products"],
            "slow",
            "products in it are fast" if facts["bf16_products"] else "no fast products in it",
            "this processor has no instructions for it: trainings stay in float32",
        ),
        _row(
            "processes for cores",
            has_programs,
            "missing",
            facts["programs_for_cores"],
            "one process trains with threads instead; the reason stands above",
        ),
        _row(
            "memory of tensors",
            facts["memory_kept_for_tensors"],
            "slow",
            "kept for the next" if facts["memory_kept_for_tensors"] else "given back each time",
            "it takes glibc, and MIXLAB_KEEP_MEMORY must not be 0",
        ),
        _row(
            "JPEG decoder",
            facts["jpeg_decoder"] == "simplejpeg",
            "slow",
            facts["jpeg_decoder"].split(" ")[0],
            "pip install simplejpeg: photos are decoded faster",
        ),
    ]
