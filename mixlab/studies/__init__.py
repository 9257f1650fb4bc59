"""The paper's questions: `mixlab study NAME` asks the one in questions/NAME.py, which defines STUDY.

Here is what they share: harness.py (what a study is), trainings.py (trainings as cells of a table), presets.py (what
they train), rows.py (CSV files), statistics.py.
"""

import difflib
import importlib
import pkgutil

from mixlab.errors import UsageError
from mixlab.studies import questions
from mixlab.studies.harness import Study


def study_names() -> tuple[str, ...]:
    """The names of all studies, as their modules are called."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(questions.__path__)))


def open_study(name: str) -> Study:
    """The study of that name; UsageError with the nearest one."""
    if name not in study_names():
        close = difflib.get_close_matches(name, study_names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(study_names())}"
        raise UsageError(f"there is no study {name!r}", where="NAME", hint=hint)
    study: Study = importlib.import_module(f"mixlab.studies.questions.{name}").STUDY
    return study
