"""The identifiers of licences that the Hugging Face Hub takes in the front matter of a card."""

import difflib

from mixlab.errors import UsageError

NOT_STATED = "not stated"
# As the Hub's own message lists them: https://huggingface.co/docs/hub/repositories-licenses
LICENCES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl",
    "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research",
    "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0",
    "openmdw-1.1", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl",
    "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
)  # fmt: skip


def checked_licence(licence: str) -> str:
    """`licence` as the Hub writes it, such as apache-2.0. UsageError, with the nearest, if it knows none such."""
    if licence == NOT_STATED:
        return licence
    name = licence.strip().lower().replace(" ", "-")
    if name in LICENCES:
        return name
    nearest = difflib.get_close_matches(name, LICENCES, n=1, cutoff=0.5)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    raise UsageError(
        f"the Hugging Face Hub knows no licence {licence[:60]!r}",
        where="--licence",
        hint=f"{meant}`other` is for one of your own",
    )


def hub_identifier(licence: str) -> str:
    """What stands in the front matter for a checked licence."""
    return "unknown" if licence == NOT_STATED else licence
