"""The `--json` objects of the commands as tables for a person. Names from outside are escaped."""

from typing import Any

from rich.markup import escape as escape_markup
from rich.table import Table

from mixlab.escape import visible
from mixlab.language import tell
from mixlab.report.screen import Screen, format_seconds
from mixlab.words import with_article

ENOUGH = 1000  # images, for shares that differ by tenths of a point
NUM_ABSENT = 10  # classes without images, that are named
NUM_GUESSES = 3  # labels of each of many images
PLAIN_MODELS = ("model", "side", "size", "GMACs", "for")
NUM_TOP = 5  # classes, up to which top-5 says nothing
NUM_LISTED = 20  # of bad files or duplicates, before "and n more"


def escape(text: str) -> str:
    """Text from outside as a cell of a table."""
    return escape_markup(visible(text))


def percent(fraction: float | None) -> str:
    """`0.9731` -> `97.3 %`, None -> `-`."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def show_facts(facts: dict[str, Any], screen: Screen) -> None:
    """One line a key; numbers with separators, nested dicts as `name value`."""
    table = Table("fact", "value", show_header=False)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(
                f"{name} {inner if inner is not None else 'missing'}" for name, inner in value.items()
            )
        table.add_row(key, f"{value:,}" if type(value) is int else escape(str(value)))
    screen.show(table)


def show_models(rows: list[dict[str, Any]], screen: Screen) -> None:
    """`mixlab models`, for terminals of 80 columns."""
    table = Table(*PLAIN_MODELS, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        side = "" if row["image_side"] is None else str(row["image_side"])
        size = "" if row["num_parameters"] is None else f"{row['num_parameters'] / 1e6:.1f} M"
        macs = "" if row["macs"] is None else f"{row['macs'] / 1e9:.3g}"
        table.add_row(row["model"], side, size, macs, row["purpose"])
    screen.show(table)
    screen.say("side: of images, in pixels; size: parameters with 1000 classes; GMACs: of one image")


def show_recipes(rows: list[dict[str, Any]], screen: Screen) -> None:
    """`mixlab recipes`: a line each."""
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        screen.say(f"{row['name']:<{width}}  {row['purpose']}")
    screen.say(
        "`mixlab train DATA --recipe NAME` takes one; `mixlab recipes NAME` says what it gave, and has its keys"
    )


def show_keys(rows: list[dict[str, Any]], screen: Screen) -> None:
    """`mixlab keys`."""
    table = Table("key", "takes", "default", "what it does")
    for row in rows:
        table.add_row(row["key"], escape(row["takes"]), escape(row["default"]), escape(row["sentence"]))
    screen.show(table)


def show_key(row: dict[str, Any], screen: Screen) -> None:
    """`mixlab keys KEY`."""
    part, _, name = row["key"].rpartition(".")
    screen.say(f"{row['key']}: {row['sentence']}")
    screen.say(f"  takes {with_article(row['takes'])}; default {row['default']}; level {row['level']}")
    screen.say(
        f"  on the command line {', '.join(row['options'])}; in Python {row['key'].replace('.', '__')}="
    )
    screen.say(f"  in a TOML file {name}" + (f" under [{part}]" if part else ""))
    for recipe, value in row["recipes"].items():
        screen.say(f"  the recipe {recipe} has {value}")


def show_published(rows: list[dict[str, Any]], screen: Screen) -> None:
    """`mixlab models --pretrained`."""
    table = Table("name", "MiB", "classes", "input", "GELU", "top-1", "here", "what it is")
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.2f} % {row['data']}"
        numbers = [f"{row['size_mib']:.1f}", str(row["num_classes"]), escape(row["input_range"])]
        here = "yes" if row["cached"] else ""
        table.add_row(row["name"], *numbers, row["gelu"], top1, here, escape(row["provenance"]))
    screen.show(table)
    screen.say("the addresses of the files are in --json; ImageNet accuracies are their publishers'")


def show_conversion(result: dict[str, Any], screen: Screen) -> None:
    """`mixlab convert`."""
    source = result["source"]
    screen.say(
        f"source: {source.get('source', source.get('data', 'a run'))}, {source.get('format', 'mixlab')}"
    )
    show_facts(result["model"], screen)
    for key, value in source.get("assumed", {}).items():
        screen.say(f"assumed: {key} {value}")
    for note in source.get("notes", []):
        screen.say(f"note: {note}")
    for title, compared in (("changed", result["change"]), ("run by timm itself", result.get("in_timm"))):
        if compared:
            what = compared.get("numerics", "against these weights as they were trained")
            screen.say(
                f"{title}: {what}; on {compared['num_probes']} random inputs the logits differ by "
                f"{compared['max_difference']:.2g} at most (the largest is {compared['largest_logit']:.2g}), and "
                f"{compared['same_top1']} have the same top-1"
            )
    screen.say(f"written to {result['destination']} as {result['format']}; read back {result['read_back']}")


def show_studies(rows: list[dict[str, Any]], screen: Screen) -> None:
    """`mixlab study`."""
    table = Table("study", "of", "question", show_lines=True)
    for row in rows:
        table.add_row(row["name"], row["subject"], escape(row["question"]))
    screen.show(table)
    screen.say("`mixlab study NAME` asks one; --smoke tries all of it in a minute")


def show_study(result: dict[str, Any], screen: Screen) -> None:
    """`mixlab study NAME`."""
    for finding in result["findings"]:
        screen.say(f"{finding['statement']} {finding['verdict'].capitalize()}: {finding['here']}")
    screen.say(f"report: {result['report']}")


def show_export(result: dict[str, Any], screen: Screen) -> None:
    """`mixlab export`."""
    many = result["modality"]
    sizes = result.get("batches", [])
    batches = f" in batches of {', '.join(map(str, sizes))}" if sizes else ""
    screen.say(
        f"compared on {result['num_pictures']} {many}{batches}: logits differ by {result['max_difference']:.2g} at "
        f"most (the largest is {result['largest_logit']:.3g}), {result['same_top1']} of "
        f"{result.get('num_compared', result['num_pictures'])} answers have the same top-1"
    )
    if "max_pixel_difference" in result:
        screen.say(
            f"pixels scaled inside the graph differ by {result['max_pixel_difference']} of 255 at most"
        )
        if result["num_pictures"] < ENOUGH:
            screen.say(
                f"on fewer than {ENOUGH:,} images: that says little; give more by --pictures or --data"
            )
    if "int8" in result:
        found = result["int8"]
        table = Table("product", "relative error alone", "runs in")
        for row in found["products"]:
            table.add_row(
                row["product"], f"{row['relative_error']:.4f}", "int8" if row["is_int8"] else "float32"
            )
        screen.show(table)
        table = Table("", "float32", "int8")
        table.add_row(
            f"accuracy, {found['judged_on']} ({found['num_judged']:,} {many})",
            *(f"{100 * found[k]:.2f} %" for k in ("top1_before", "top1_after")),
        )
        table.add_row(
            f"accuracy, test ({found['num_test']:,} {many})",
            *(f"{100 * found[k]:.2f} %" for k in ("test_before", "test_after")),
        )
        table.add_row(
            "size", *(f"{found[k] / 2**20:.2f} MiB" for k in ("num_bytes_before", "num_bytes_after"))
        )
        table.add_row("speed, batches of 16", "1", f"{found['speed_ratio']:.2f} times")
        screen.show(table)
        if min(found["num_judged"], found["num_test"]) < ENOUGH:
            screen.say(f"on fewer than {ENOUGH:,} {many}: a change of a point may be chance")
    screen.say(f"written to {result['destination']}, {result['num_bytes'] / 2**20:.2f} MiB")


def show_permutation(result: dict[str, Any], screen: Screen) -> None:
    """`mixlab permute`."""
    show_facts(result, screen)


def show_few_shot(result: dict[str, Any], screen: Screen) -> None:
    """`mixlab fewshot`."""
    table = Table("examples of each class", "accuracy (mean of seeds)", "lowest", "highest")
    for row in result["shots"]:
        values = [percent(row[key]) for key in ("top1", "lowest", "highest")]
        table.add_row(str(row["shots"]), *values)
    screen.show(table)
    screen.say(
        f"{result['num_features']} features, {result['num_classes']} classes, {result['num_test']} test examples, "
        f"{result['num_seeds']} seeds, l2 {result['l2']:g}"
    )


def show_runs(rows: list[dict[str, Any]], screen: Screen) -> None:
    """`mixlab runs`."""
    table = Table("run", "validation", "test", "steps", "time", "finished")
    for row in rows:
        ratios = [
            "-" if row[key] is None else f"{100 * row[key]:.2f} %" for key in ("validation_top1", "test_top1")
        ]
        finished = "yes" if row["finished"] else "no"
        if row["unreadable"]:
            finished = escape(f"unreadable: {row['unreadable']}")
        table.add_row(
            escape(row["run"]), *ratios, str(row["steps"]), format_seconds(row["seconds"]), finished
        )
    screen.show(table)


def show_evaluation(result: dict[str, Any], screen: Screen) -> None:
    """`mixlab evaluate`."""
    many = result["modality"]
    screen.say(
        f"accuracy {100 * result['top1']:.2f} % ({result['num_correct']:,} of {result['num_images']:,})"
    )
    if "balanced_accuracy" in result:
        screen.say(f"balanced accuracy {100 * result['balanced_accuracy']:.2f} %")
    low, high = result["top1_interval"]
    screen.say(f"95 % interval for others like these: {100 * low:.2f} to {100 * high:.2f} %")
    # Among five classes or fewer the right one is always one of the five.
    has_top5 = len(result["per_class"]) > 5
    top5 = f"top-5 {percent(result['top5'])}, " if has_top5 else ""
    screen.say(f"{top5}loss {result['loss']:.4f}, calibration error (ECE) {100 * result['ece']:.2f} points")
    if result["temperature"] != 1:
        screen.say(
            f"probabilities are calibrated (temperature {result['temperature']:g}); "
            f"without it the calibration error is {100 * result['ece_raw']:.2f} points"
        )
    for row in result["coverage"]:
        screen.say(describe_coverage(row, result["num_images"], many))
    if "real" in result:
        real = result["real"]
        screen.say(
            f"with ReaL's labels: accuracy {100 * real['top1']:.2f} % ({real['num_correct']} of "
            f"{real['num_images']})"
            + (f", top-5 {percent(real['top5'])}" if has_top5 else "")
            + f"; {real['num_left_out']} without a label left out"
        )
    table = Table("class", many, "correct", "precision", "recall", "F1")
    shown = [row for row in result["per_class"] if row["num_images"]]
    for row in shown:
        counts = [str(row[key]) for key in ("num_images", "num_correct")]
        table.add_row(
            escape(row["label"]), *counts, *(percent(row[key]) for key in ("precision", "recall", "f1"))
        )
    screen.show(table)
    if len(shown) < len(result["per_class"]):
        absent = [row["label"] for row in result["per_class"] if not row["num_images"]]
        more = f" and {len(absent) - NUM_ABSENT} more" if len(absent) > NUM_ABSENT else ""
        are, is_ = ("class has", "is") if len(absent) == 1 else ("classes have", "are")
        screen.say(
            f"{len(absent)} {are} no {many} here and {is_} not shown: {', '.join(absent[:NUM_ABSENT])}{more}"
        )
    for file in result["bad"]:
        screen.say(f"not counted, unreadable: {file['path']}: {file['reason']}")


def describe_coverage(row: dict[str, Any], num_images: int, many: str = "images") -> str:
    """What a confidence, chosen on validation for a share of right answers, gives on other examples: a sentence.

    row: of `Evaluation.coverage`. num_images: examples of that evaluation.
    """
    values = {"target": 100 * row["target"], "n": num_images, "many": many, "limit": row["min_confidence"]}
    if not row["num_sure"]:
        return tell(
            "If {target:g} % should be right, none of the {n:,} {many} is sure enough (confidence {limit:g} or "
            "more).",
            **values,
        )
    values |= {"sure": row["num_sure"], "right": 100 * row["accuracy"]}
    if not row["min_confidence"]:
        return tell(
            "If {target:g} % should be right, none of the {n:,} {many} needs a second look; of these {right:.1f} % "
            "were right.",
            **values,
        )
    return tell(
        "If {target:g} % should be right, {sure:,} of the {n:,} {many} need no second look (confidence {limit:g} or "
        "more); of those {right:.1f} % were right.",
        **values,
    )


def show_predictions(result: dict[str, Any], one: str, many: str, screen: Screen) -> None:
    """`mixlab predict`: all labels of one example, or a line for each of many. one, many: the modality's words."""
    rows = result[many]
    if len(rows) > 1:
        for row in rows:
            guesses = row.get("predictions", [])[:NUM_GUESSES]
            found = ", ".join(f"{guess['label']} {percent(guess['probability'])}" for guess in guesses)
            screen.say(f"{row['path']}: {found or 'unreadable: ' + row['error']}")
        if result["num_bad"]:
            screen.say(f"{result['num_bad']} of {len(rows)} could not be read")
        return
    table = Table(one, "label", "probability")
    for row in rows:
        if "error" in row:
            table.add_row(escape(row["path"]), escape(f"unreadable: {row['error']}"), "")
        for rank, guess in enumerate(row.get("predictions", [])):
            name = escape(row["path"]) if rank == 0 else ""
            label = escape(guess["label"]) + (" (unsure)" if rank == 0 and row.get("unsure") else "")
            table.add_row(name, label, percent(guess["probability"]))
    screen.show(table)
    if "num_unsure" in result:
        screen.say(f"{result['num_unsure']} of {result['num_ok']} {many} are unsure")
