"""How much faster than a ViT is a Mixer (sections 3.1 and 3.2, Tables 2 and 3)? The paper's large models, here."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixlab.cpu.inference import fast
from mixlab.device import describe_machine, machine_name, set_threads
from mixlab.models.catalog import create_model
from mixlab.studies.harness import Answer, Finding, Options, Study
from mixlab.studies.published import paper_frontiers, paper_results, paper_tables
from mixlab.studies.rows import Row, distinct, make_folder, read_rows, write_rows
from mixlab.studies.turns import alternate, forward

Sized = tuple[str, dict[str, Any], float]
Pair = tuple[Sized, Sized]
InTurns = Callable[[Sequence[Callable[[], Any]], int], list[list[float]]]
RATIOS = "throughput.csv"
# The paper's pairs: Mixer, ViT, and their images a second on a TPUv3 core (Tables 2 and 3). A Mixer at K times the
# resolution has K^2 times as wide token-mixing MLPs (Appendix C).
PAIRS: tuple[Pair, ...] = (
    (("mixer_l16", {"image_size": 224}, 419), ("timm/vit_large_patch16_224", {"image_size": 224}, 280)),
    (
        ("mixer_l16", {"image_size": 448, "token_mlp_dim": 2048}, 105),
        ("timm/vit_large_patch16_224", {"image_size": 512}, 32),
    ),
    (("mixer_h14", {"image_size": 224}, 194), ("timm/vit_huge_patch14_224", {"image_size": 224}, 87)),
    (
        ("mixer_h14", {"image_size": 448, "token_mlp_dim": 2560}, 40),
        ("timm/vit_huge_patch14_224", {"image_size": 518}, 15),
    ),
)
RATIO_COLUMNS = (
    "mixer", "mixer_size", "vit", "vit_size", "batch_size", "mixer_images_per_second_per_core",
    "vit_images_per_second_per_core", "ratio", "lowest", "highest", "paper_ratio", "rounds", "threads", "machine",
)  # fmt: skip


@torch.inference_mode()
def measure_ratios(
    options: Options, pairs: Sequence[Pair] = PAIRS, in_turns: InTurns = alternate
) -> list[Row]:
    """`pairs` on this machine, in turns; a row of throughput.csv as soon as a pair is measured.

    Rows of other machines, numbers of threads, batches or rounds stay in the file and are not returned.
    """
    path = options.out / RATIOS
    make_folder(options.out)
    rows = read_rows(path)
    set_threads(options.threads)
    threads = torch.get_num_threads()
    rounds, batch = (1, 1) if options.smoke else (5, 4)
    here = {"batch_size": str(batch), "rounds": str(rounds), "threads": str(threads)}
    here |= {"machine": machine_name(describe_machine())}
    found = []
    for mixer, vit in pairs[:1] if options.smoke else pairs:
        key = here | {"mixer": mixer[0], "mixer_size": str(mixer[1]["image_size"])}
        known = next((row for row in rows if key.items() <= row.items()), None)
        if known is None:
            options.screen.say(f"measuring {mixer[0]} at {mixer[1]['image_size']} against {vit[0]}")
            works = []
            for name, settings, _ in (mixer, vit):
                model = create_model(name, **settings).eval()
                size = settings["image_size"]
                works.append(forward(fast(model), torch.randn(batch, 3, size, size)))
            ours, theirs = in_turns(works, rounds)
            ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
            known = key | {
                "vit": vit[0],
                "vit_size": str(vit[1]["image_size"]),
                "mixer_images_per_second_per_core": f"{batch / statistics.median(ours) / threads:.4g}",
                "vit_images_per_second_per_core": f"{batch / statistics.median(theirs) / threads:.4g}",
                "ratio": f"{statistics.median(ratios):.3f}",
                "lowest": f"{ratios[0]:.3f}",
                "highest": f"{ratios[-1]:.3f}",
                "paper_ratio": f"{mixer[2] / vit[2]:.2f}",
            }
            rows.append(known)
            write_rows(path, RATIO_COLUMNS, rows)
        found.append(known)
    return found


def answer_ratios(rows: list[Row]) -> Answer:
    findings = [
        Finding(
            statement=f"{row['mixer']} at {row['mixer_size']} pixels is faster than "
            f"{row['vit'].removeprefix('timm/')} at {row['vit_size']}.",
            paper=f"{row['paper_ratio']} times, on a TPUv3 core.",
            here=f"{row['ratio']} times ({row['lowest']} to {row['highest']} in {row['rounds']} turns): "
            f"{row['mixer_images_per_second_per_core']} against {row['vit_images_per_second_per_core']} images a "
            "second and core.",
            verdict="holds"
            if float(row["lowest"]) > 1
            else "does not hold"
            if float(row["highest"]) < 1
            else "open",
            limits="Another machine, its own kinds of arithmetic and libraries: the ViT runs as timm's code does in "
            "PyTorch, the Mixer through mixlab's inference pass. Weights are drawn at random, which changes no time.",
        )
        for row in rows
    ]
    columns = ["Mixer", "pixels", "ViT", "pixels of the ViT", "ratio", "range", "paper"]
    table = [
        [
            row["mixer"], row["mixer_size"], row["vit"], row["vit_size"], row["ratio"],
            f"{row['lowest']} to {row['highest']}", row["paper_ratio"],
        ]
        for row in rows
    ]  # fmt: skip
    return Answer(
        settings=[
            (heading, distinct(rows, column))
            for heading, column in (
                ("Machine", "machine"), ("Threads", "threads"), ("Batch", "batch_size"), ("Turns", "rounds"),
            )
        ],
        findings=findings,
        tables=[("How many times faster", columns, table), *paper_tables(paper_results())],
        figures=paper_frontiers(paper_results()),
    )  # fmt: skip


STUDY = Study(
    name="throughput",
    title="Mixer against ViT: speed",
    question="How many times as fast as a ViT are the paper's large Mixers on this machine?",
    paper="Sections 3.1 and 3.2, Tables 2 and 3: Mixer-H/14 2.5 times as fast as ViT-H/14 at the resolution of "
    "fine-tuning (2.2 times at 224 pixels), Mixer-L/16 105 images a second and core against 32.",
    run=lambda options: answer_ratios(measure_ratios(options)),
    subject="",
)
