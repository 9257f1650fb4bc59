"""What a temperature and a threshold of confidence keep of what they promise, on images that chose neither.

    python -m benchmarks.calibration WEIGHTS DATA [--splits 5]

Every image of DATA's test split is classified once. Then it is cut into halves at random, as often as is said: one
half chooses temperature and thresholds, the other measures. Prints a JSON object a cut: calibration error before and
after, and for each share of right answers the coverage promised, and coverage and accuracy found.
"""

import argparse
import json

import numpy as np
import torch

from mixlab.checkpoint.open import open_weights
from mixlab.data.loader import evaluation_batches
from mixlab.data.reading import load_examples
from mixlab.data.sources import open_source
from mixlab.evaluation.calibration import coverage_at, find_thresholds, fit_temperature
from mixlab.evaluation.classify import classify
from mixlab.evaluation.metrics import calibration_bins, calibration_error
from mixlab.training.evaluate import with_class_numbers

BATCH = 250


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights")
    parser.add_argument("data")
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()
    weights, source = open_weights(options.weights), open_source(options.data)
    test = with_class_numbers(source.splits["test"], source, weights.class_names)
    examples = load_examples(test, weights.preprocess, in_memory=True)
    batches = evaluation_batches(examples, BATCH, lambda file: None)
    found = classify(weights.model, batches, torch.device("cpu"), keep_logits=True)
    logits, label = torch.from_numpy(found.logits), torch.from_numpy(found.label)
    for seed in range(options.splits):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(label)))
        chooses, measures = order[: len(order) // 2], order[len(order) // 2 :]
        print(json.dumps({"split": seed} | measure(logits, label, chooses, measures)))


def measure(
    logits: torch.Tensor, label: torch.Tensor, chooses: torch.Tensor, measures: torch.Tensor
) -> dict[str, object]:
    """One cut; `chooses` and `measures`: numbers of images."""
    temperature = fit_temperature(logits[chooses], label[chooses])

    def sure(rows: torch.Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        confidence, predicted = (logits[rows] / temperature).softmax(dim=1).max(dim=1)
        return confidence.double().numpy(), (predicted == label[rows]).numpy()

    before, after = (
        calibration_error(calibration_bins(*sure(measures, value))) for value in (1.0, temperature)
    )
    promised = find_thresholds(*sure(chooses, temperature))
    kept = [
        row | {"found": coverage_at(row["min_confidence"], *sure(measures, temperature))} for row in promised
    ]
    accuracy = float(sure(measures, 1.0)[1].mean())
    return {"top1": accuracy, "temperature": temperature, "ece_raw": before, "ece": after, "kept": kept}


if __name__ == "__main__":
    main()
