"""`mixlab study throughput`: the paper's pairs of models, measured in turns."""

import pytest

from mixlab.cpu.describe import describe_settings
from mixlab.report.screen import Screen
from mixlab.studies.harness import Options
from mixlab.studies.published import paper_results
from mixlab.studies.questions.throughput import PAIRS, RATIO_COLUMNS, answer_ratios, measure_ratios
from mixlab.studies.rows import read_rows, write_rows
from mixlab.studies.turns import alternate


def test_the_pairs_are_those_of_the_papers_text():
    speeds = {(r["model"], r["resolution"]): r["images_per_second_per_core"] for r in paper_results()}
    names = {"mixer_l16": "Mixer-L/16", "mixer_h14": "Mixer-H/14",
             "timm/vit_large_patch16_224": "ViT-L/16", "timm/vit_huge_patch14_224": "ViT-H/14"}  # fmt: skip
    for pair in PAIRS:
        for name, settings, speed in pair:
            assert float(speeds[names[name], str(settings["image_size"])]) == speed
    wide = dict(PAIRS[1][0][1])
    plain = describe_settings({"name": "mixer_l16", "num_classes": 1000}, batch_size=1)["macs"]
    large = describe_settings({"name": "mixer_l16", "num_classes": 1000} | wide, batch_size=1)["macs"]
    assert large / plain == pytest.approx(5.3, abs=0.05)  # 237 GMACs, counted from the paper's Appendix C


def tiny(hidden_dim):
    return {"image_size": 32, "hidden_dim": hidden_dim, "num_blocks": 1, "num_classes": 2}


def test_pairs_are_measured_once_for_each_machine_and_number_of_threads(tmp_path):
    pairs = tuple(
        (("mixer_pico4", tiny(width), 419), ("mixer_pico4", tiny(16 * width), 280)) for width in (8, 16)
    )
    options = Options(out=tmp_path / "out", threads=1, screen=Screen(quiet=True))
    calls = []

    def dying(works, rounds):
        calls.append(rounds)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return alternate(works, rounds)

    pairs = (pairs[0], (("mixer_micro4", tiny(16), 4), pairs[1][1]))
    with pytest.raises(KeyboardInterrupt):
        measure_ratios(options, pairs, dying)
    (first,) = read_rows(tmp_path / "out/throughput.csv")
    other = first | {"machine": "another", "ratio": "9.000"}
    write_rows(tmp_path / "out/throughput.csv", RATIO_COLUMNS, [other, first])
    rows = measure_ratios(options, pairs, dying)
    assert [row["mixer"] for row in rows] == ["mixer_pico4", "mixer_micro4"]
    assert rows[0] == first
    assert measure_ratios(options, pairs, dying) == rows
    assert calls == [5, 5, 5]
    assert len(read_rows(tmp_path / "out/throughput.csv")) == 3
    assert float(first["lowest"]) <= float(first["ratio"]) <= float(first["highest"])
    assert first["paper_ratio"] == "1.50"
    answer = answer_ratios(rows)
    assert ("Threads", "1") in answer.settings
    assert "another" not in str(answer.settings)


@pytest.mark.parametrize(("ratio", "verdict"), [("1.2", "holds"), ("1.0", "open"), ("0.8", "does not hold")])
def test_the_verdict_on_a_ratio_is_of_all_its_turns(ratio, verdict):
    row = dict.fromkeys(RATIO_COLUMNS, "1") | {
        "lowest": str(float(ratio) - 0.1), "highest": str(float(ratio) + 0.1), "ratio": ratio,
    }  # fmt: skip
    (finding,) = answer_ratios([row]).findings
    assert finding.verdict == verdict
