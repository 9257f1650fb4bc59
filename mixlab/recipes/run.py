"""What `mixlab.train` and the like return: a finished run, to look at and to go on with."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mixlab.serving.predict import Classifier, load


@dataclass(frozen=True, eq=False, repr=False)
class Run(Mapping[str, Any], os.PathLike[str]):
    """A run that has ended. It is its folder where a path is taken, and its `result` where a mapping is.

    result: what `mixlab train --json` prints.
    """

    result: dict[str, Any]

    @property
    def path(self) -> Path:
        """Its folder."""
        return Path(self.result["run"])

    @property
    def report(self) -> Path:
        """report.html, which any browser shows."""
        return self.path / "report.html"

    @property
    def test(self) -> dict[str, Any] | None:
        """The metrics of the test split, in fractions: top1, num_images, per_class, ...; None if it had none."""
        test: dict[str, Any] | None = self.result.get("test")
        return test

    @property
    def accuracy(self) -> float | None:
        """Share of the test split that was predicted right; None if nothing was tested."""
        return None if self.test is None else self.test["top1"]

    def load(self, **options: Any) -> Classifier:
        """The classifier that it ended with; options: those of `mixlab.load`."""
        return load(self.path, **options)

    def __fspath__(self) -> str:
        return str(self.result["run"])

    def __getitem__(self, key: str) -> Any:
        return self.result[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.result)

    def __len__(self) -> int:
        return len(self.result)

    def __repr__(self) -> str:
        return f"Run({os.fspath(self)!r}, {self._accuracy()})"

    def _accuracy(self) -> str:
        if self.test is None:
            return "not tested"
        low, high = (f"{100 * bound:.1f}" for bound in self.test["top1_interval"])
        return f"test accuracy {100 * self.test['top1']:.2f} % (95 % interval {low} to {high} %)"

    def _repr_html_(self) -> str:
        report = self.report
        place = report.as_uri() if report.is_absolute() else quote(report.as_posix())
        return (
            f"<p><b>{escape(self.path.name)}</b>: {self._accuracy()}. "
            f'<a href="{escape(place)}" target="_blank">report</a></p>'
        )
