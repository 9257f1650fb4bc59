"""Compare models under one recipe: the same data, steps and seeds; mean and standard deviation of the accuracy.

    python examples/compare_models.py digits --models mixer_pico2 timm/baseline_vit_micro --seeds 3 --steps 500

Compared is the validation accuracy: the test split is for the model that is chosen in the end.
"""

import argparse
import statistics
from pathlib import Path

import mixlab
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--models", nargs="+", default=["mixer_pico2", "timm/baseline_vit_micro"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()

    for model in given.models:
        top1 = []
        for seed in range(given.seeds):
            result = mixlab.train(
                given.data,
                model__name=model,
                steps=given.steps,
                seed=seed,
                screen=Screen(quiet=True),
                figures=False,
                run=f"runs/compare-{model.replace('/', '-')}-{seed}",
            )
            log = read_run_log(Path(result["run"]) / "metrics.jsonl")
            top1.append(100 * max(row["top1"] for row in log if row["event"] == "validation"))
        spread = f" +- {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        print(
            f"{model}: {statistics.mean(top1):.2f}{spread} % (n={len(top1)}), {result['num_parameters']:,} parameters"
        )


if __name__ == "__main__":
    main()
