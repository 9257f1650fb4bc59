"""What a server says to somebody whose file it cannot read."""

from pathlib import PurePath

from mixlab.data.modality import Modality

FAULTS_OF_FILES = (
    "damaged: ", "truncated: ", "cut off: ", "silent", "too long: ", "empty: ", "no sound file", "samples of up to",
)  # fmt: skip


def hint(modality: Modality, plain: str, reason: str = "") -> str:
    """What to do about a body that cannot be read: mend the file, or send it in another way, with examples.

    plain: see `Job`. reason: what is wrong with a file.
    """
    if reason.startswith(FAULTS_OF_FILES):
        return modality.repair
    file = modality.program.example if modality.program else "FILE"
    end = PurePath(file).suffix
    if plain == "tar":
        return (
            f"send a plain tar: tar cf - *{end} | curl --data-binary @- ADDRESS/predict-many; or a form: "
            f"curl -F file=@a{end} -F file=@b{end} ADDRESS/predict-many; or JSON: "
            f'{{"{modality.many}": [BASE64, ...]}}'
        )
    return (
        f"send the file itself: curl --data-binary @{file} ADDRESS/predict; or a form: "
        f'curl -F file=@{file} ADDRESS/predict; or JSON: {{"{modality.one}": BASE64}}; ADDRESS/docs shows each'
    )
