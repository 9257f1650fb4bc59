"""What `mixlab check` and `mixlab doctor` found, in words, with what to do about it."""

from typing import Any

from rich.table import Table

from mixlab.report.screen import Screen
from mixlab.report.tables import NUM_LISTED, escape
from mixlab.words import counted


def show_doctor(rows: list[dict[str, str]], screen: Screen) -> None:
    """`mixlab doctor`: what there is, whether that is well, and what to do."""
    table = Table("what", "verdict", "found", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(row["what"], row["verdict"], escape(row["found"]))
    screen.show(table)
    for row in rows:
        if row["advice"]:
            screen.say(f"{row['what']}: {row['advice']}")


def show_check(result: dict[str, Any], one: str, many: str, screen: Screen) -> None:
    """`mixlab check`. one, many: what its examples are called."""
    splits = list(next(iter(result["classes"].values())))
    table = Table("class", *splits)
    for name, counts in result["classes"].items():
        table.add_row(escape(name), *(f"{counts[split]:,}" for split in splits))
    screen.show(table)
    screen.say(f"{counted(result['num_ok'], one, many)} can be read, {result['num_bad']:,} cannot")
    _say_sizes(result, screen)
    _list("unreadable", [f"{file['path']}: {file['reason']}" for file in result["bad"]], screen)
    across = [
        f"{' = '.join(group['paths'])} ({', '.join(group['splits'])})" for group in result["duplicates"]
    ]
    _list("the same in several splits", across, screen)
    within = [f"{' = '.join(group['paths'])} ({group['split']})" for group in result["duplicates_within"]]
    _list("the same inside one split", within, screen)
    contrary = [
        f"{' = '.join(group['paths'])} ({', '.join(group['labels'])})" for group in result["conflicts"]
    ]
    _list("the same under different labels", contrary, screen)
    near = [_pair(pair, has_splits=len(splits) > 1) for pair in result["near_copies"]]
    if near:
        screen.say(f"{result['num_near_copies']:,} {many} look nearly like another one, such as")
        for line in near[:NUM_LISTED]:
            screen.say(f"  {line}")
    for kind in result["skipped"]:
        screen.say(f"left out: {kind['count']:,} {kind['reason']}: {', '.join(kind['examples'])}")
    if result.get("grey_peak") is not None:
        screen.say(
            f"16-bit grey: values up to {result['grey_peak']:,}; {result['grey_max']:,} is taken as white"
        )
    for line in check_advice(result, one, many):
        screen.say(f"advice: {line}")


def _pair(pair: dict[str, list[str]], *, has_splits: bool) -> str:
    return " ~ ".join(pair["paths"]) + (f" ({', '.join(pair['splits'])})" if has_splits else "")


def _say_sizes(result: dict[str, Any], screen: Screen) -> None:
    """What the modality counted, where it has such facts."""
    sizes = result.get("sizes")
    if sizes:
        width, height, common = sizes["width"], sizes["height"], sizes["most_common"]
        screen.say(
            f"width {width['min']:,} to {width['max']:,} pixels, height {height['min']:,} to {height['max']:,}; "
            f"most common {common[0]:,} x {common[1]:,}"
        )
    seconds = result.get("seconds")
    if seconds:
        screen.say(
            f"{seconds['min']:.2f} to {seconds['max']:.2f} seconds; half have up to {seconds['median']:.2f}"
        )
    for name in ("modes", "formats", "rates", "channels"):
        if result.get(name):
            screen.say(f"{name}: {', '.join(f'{key} {count:,}' for key, count in result[name].items())}")


def check_advice(result: dict[str, Any], one: str, many: str) -> list[str]:
    """What to do about what was found, a sentence each; one that says so where nothing is wrong."""
    found = []
    if result["num_bad"]:
        found.append(f"mend or remove the unreadable {many}; a training leaves them out and lists them")
    if result["duplicates"]:
        found.append(
            f"remove the {many} from train that are in another split too: accuracy there is too good"
        )
    if result["conflicts"]:
        found.append("decide which label is right: a model learns both")
    if result["num_duplicates_within"]:
        number = counted(result["num_duplicates_within"], one, many)
        found.append(
            f"{number} could go, with one of each kept; where mixlab draws the splits, copies stay together"
        )
    if result["num_near_copies"]:
        found.append(
            f"look at the {many} that are nearly alike: if one is in training and its like in test, the accuracy is "
            "too good"
        )
    found += result.get("cautions", [])
    return found or ["nothing is wrong here: `mixlab train DATA` comes next"]


def _list(title: str, lines: list[str], screen: Screen) -> None:
    if lines:
        screen.say(f"{title}: {len(lines):,}")
    for line in lines[:NUM_LISTED]:
        screen.say(f"  {line}")
    if len(lines) > NUM_LISTED:
        screen.say(f"  and {len(lines) - NUM_LISTED:,} more; --json lists all")
