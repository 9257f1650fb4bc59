"""`mixlab study`; its docstring is the command's help.

torch is imported inside, so that help and usage errors come at once.
"""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mixlab.commands.context import Context, emit
from mixlab.errors import MixlabError, UsageError


def study(
    name: str | None = None,
    subject: str | None = None,
    /,
    *,
    preset: Literal["cpu", "paper"] = "cpu",
    smoke: Annotated[bool, Parameter(negative="")] = False,
    seeds: int | None = None,
    minutes: float | None = None,
    out: Path | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> None:
    """Repeat an experiment of the paper: trainings or measurements, figures, and a report beside the paper's.

    Finished trainings are kept: a call that was stopped goes on where it was. Without a NAME, lists the studies.

    Parameters
    ----------
    name
        Of the study.
    subject
        Its data set as for `train`, or weights for a study of weights.
    preset
        cpu, sized for two cores; paper, the paper's models and recipe on ImageNet-1k, for want of JFT-300M (not run
        by mixlab's authors).
    smoke
        Every training tiny, to see that all of it works.
    seeds
        Instead of the preset's number.
    minutes
        Of each training, instead of the preset's.
    out
        Folder for all of it; by default studies/NAME, with -smoke behind it for --smoke.
    """
    from mixlab.report.tables import show_studies, show_study
    from mixlab.studies import open_study, study_names
    from mixlab.studies.harness import Options, conduct

    screen = Context.screen()
    if name is None:
        rows = [
            {"name": known.name, "subject": known.subject, "question": known.question}
            for known in map(open_study, study_names())
        ]
        show_studies(rows, screen)
        emit({"studies": rows})
        return
    chosen = open_study(name)
    for option, value in (("--seeds", seeds), ("--minutes", minutes)):
        if value is not None and not value > 0:
            raise UsageError(f"must be above 0, got {value}", where=option)
    if chosen.subject == "" and subject is not None:
        raise UsageError("this study takes neither data nor weights", where=subject, hint="leave it out")
    for option, given in (("--preset", preset != "cpu"), ("--seeds", seeds), ("--minutes", minutes)):
        if given and chosen.subject != "DATA":
            raise UsageError("this study trains nothing", where=option, hint="leave it out")
    place = out or Path("studies") / (chosen.name + ("-smoke" if smoke else ""))
    options = Options(
        subject=subject,
        preset=preset,
        smoke=smoke,
        seeds=seeds,
        minutes=minutes,
        out=place,
        threads=threads,
        device=device,
        screen=screen,
    )
    try:
        result = conduct(chosen, options)
    except KeyboardInterrupt:
        failure = MixlabError(
            "interrupted; what was finished is kept",
            where=str(place),
            hint="the same command goes on from there",
        )
        failure.kind, failure.exit_status = "interrupted", 130
        raise failure from None
    show_study(result, screen)
    emit(result)
