"""Train on a folder of images and say what is in some of them.

    python examples/train_and_predict.py PATH --budget 10m

PATH has a folder of images for each class. `digits` is a set that needs no download; of it, give no images.
"""

import argparse

import mixlab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("images", nargs="*", help="what to predict afterwards: files or folders")
    parser.add_argument("--budget", default=None, help="total time, such as 10m")
    parser.add_argument("--steps", type=int, default=None, help="how many steps, instead of a budget")
    given = parser.parse_args()

    length = {} if given.steps is None else {"steps": given.steps}
    run = mixlab.train(given.data, budget=given.budget, **length)
    print(f"test accuracy {run.accuracy:.1%}, run {run.path}")

    classifier = run.load()
    for row in classifier.predict(given.images, top=1) if given.images else ():
        if "error" in row:
            print(f"{row['path']}: {row['error']}")
        else:
            best = row["predictions"][0]
            print(f"{row['path']}: {best['label']} ({best['probability']:.0%})")


if __name__ == "__main__":  # processes that read images may import this file again
    main()
