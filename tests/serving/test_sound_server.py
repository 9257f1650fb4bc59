"""`mixlab serve` and `predict -` with a model of sounds: every kind of file, forms, damaged files, what matters."""

import base64
import html
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.checkpoint.store import Weights, save_weights
from mixlab.cli import run_command
from mixlab.commands.context import Context
from mixlab.data.audio.decode import as_wav
from mixlab.data.audio.preprocess import SoundPreprocess
from mixlab.data.audio.tones import tone
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model, settings_of
from mixlab.serving.predict import load

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from tests.serving.test_bodies import form
from tests.serving.test_server import ask, picture, same, serving, tar_of

RATE, FRAMES = 8_000, 32
PREPROCESS = SoundPreprocess(
    rate=RATE, window=240, hop=80, fft=256, bands=40, frames=FRAMES, max_samples=RATE
)


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory):
    """A model that hears 0.34 s at a time, of a sound at most one second."""
    torch.manual_seed(0)
    model = create_model("mixer_sound1", num_classes=5, image_size=(1, FRAMES), in_channels=40)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("sounds")
    weights = Weights(
        model=model,
        model_settings=settings_of(model.config),
        preprocess=PREPROCESS,
        class_names=tuple(f"class {number}" for number in range(5)),
        provenance={},
    )
    save_weights(folder, weights)
    return folder


@pytest.fixture(scope="module")
def sound_server(sound_run):
    with serving(sound_run) as found:
        yield found


def clip(row=0, rate=RATE):
    return as_wav(tone(row, rate), rate)


def written(samples, rate, **kind):
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **kind)
    return file.getvalue()


def test_every_kind_of_sound_gets_the_answer_that_predict_gives(sound_server, sound_run):
    port, _ = sound_server
    samples = np.concatenate([tone(row, 22_050) for row in range(3)]) / 32768  # longer than what is heard
    bodies = [clip(3), as_wav(tone(4, RATE)[:800], RATE), clip(5, rate=11_025)]
    bodies += [written(samples, 22_050, format=kind) for kind in ("FLAC", "OGG", "MP3")]
    bodies.append(written(np.stack([samples, -samples / 2], 1), 22_050, format="WAV", subtype="PCM_24"))
    for body in bodies:
        status, _, answer = ask(port, "/predict", body)
        assert status == 200, answer
        same(answer["predictions"], load(sound_run).predict(body)[0]["predictions"])


def test_forms_json_and_tars_of_sounds_are_read(sound_server, sound_run):
    port, _ = sound_server
    good = [clip(1), clip(2)]
    expected = [row["predictions"] for row in load(sound_run).predict(good, top=2)]
    headers, body = form(("one.wav", good[0]))
    same(ask(port, "/predict?top=2", body, headers=headers)[2]["predictions"], expected[0])
    text = base64.b64encode(good[1]).decode()
    same(ask(port, "/predict?top=2", json.dumps({"sound": text}))[2]["predictions"], expected[1])
    for body in (
        tar_of({"a.wav": good[0], "bad.wav": good[0][:300], "b.wav": good[1]}),
        json.dumps({"sounds": [base64.b64encode(data).decode() for data in (good[0], b"no sound", good[1])]}),
    ):
        status, _, answer = ask(port, "/predict-many?top=2", body)
        assert (status, answer["num_ok"], answer["num_bad"]) == (200, 2, 1)
        same(answer["sounds"][0]["predictions"], expected[0])
        same(answer["sounds"][2]["predictions"], expected[1])
        assert answer["sounds"][1]["error"].startswith(("cut off", "no sound file"))
    status, _, answer = ask(port, "/predict", json.dumps({"image": text}))
    assert (status, answer["error"]["message"]) == (
        415, 'JSON is {"sound": BASE64} or {"sounds": [BASE64, ...]}',
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message", "hint"),
    [
        (clip()[:1_000], "cut off: 1,000 bytes", "does the file play"),
        (as_wav(np.zeros(800), RATE), "silent", "does the file play"),
        (b"RIFF\0\0\0\0WAVEfmt ", "damaged: WAV", "does the file play"),
        (picture(), "no sound file of a known kind", "Save it again as WAV or FLAC"),
        (b"hello", "no sound file of a known kind", "Save it again as WAV or FLAC"),
    ],
)
def test_what_is_no_sound_is_refused_with_what_to_do(sound_server, body, message, hint):
    if message.startswith("damaged"):
        pytest.importorskip("soundfile", reason="it is soundfile that says so")
    status, _, answer = ask(sound_server[0], "/predict", body)
    assert (status, answer["error"]["kind"]) == (415, "sound")
    assert answer["error"]["message"].startswith(message)
    assert hint in answer["error"]["hint"]


def test_the_examples_for_programs_are_of_sounds(sound_server, tmp_path):
    status, _, answer = ask(sound_server[0], "/docs")
    text = html.unescape(answer.decode())
    assert status == 200
    blocks = re.findall(r'<pre tabindex="0"(?: data-run="\w+ (\w+)")?>(.*?)</pre>', text, re.DOTALL)
    assert len(blocks) > 10
    assert not any(word in block for _, block in blocks for word in ("jpg", "image", "photo"))
    (tmp_path / "clip.wav").write_bytes(clip(1))
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(clip(2))
    shells = [
        block
        for _, block in re.findall(r'<pre tabindex="0" data-run="bash (\w+)">(.*?)</pre>', text, re.DOTALL)
    ]
    assert len(shells) >= 5
    for block in shells:
        command = block.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{sound_server[0]}")
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        assert json.loads(done.stdout).keys() & {"predictions", "sounds", "drop"}, done.stdout


def test_the_openapi_description_has_the_keys_of_sounds_only(sound_server):
    status, _, spec = ask(sound_server[0], "/openapi.json")
    text = json.dumps(spec)
    assert status == 200
    assert '"sounds"' in text
    assert '["sound"]' in text
    assert '["image"]' not in text
    answers = spec["components"]["schemas"]["Answers"]
    assert (answers["anyOf"], list(answers["properties"])) == (
        [{"required": ["sounds"]}], ["sounds", "num_ok", "num_bad"],
    )  # fmt: skip


def test_what_matters_is_the_fall_where_a_stretch_of_frames_is_blank(sound_server, sound_run):
    port, _ = sound_server
    data = clip(6)[: 44 + 2 * PREPROCESS.length]
    data = as_wav(np.frombuffer(data[44:], dtype="<i2"), RATE)  # as long as the model's input
    status, _, answer = ask(port, "/occlusion", data)
    assert (status, np.shape(answer["drop"])) == (200, (1, 16))
    assert answer["seconds"] == pytest.approx(PREPROCESS.length / RATE)
    own = load(sound_run)
    inputs = own.preprocess.to_input(torch.from_numpy(own.preprocess.read(data))[None])
    with torch.inference_mode():
        whole = own.model(inputs).softmax(1)[0]
        inputs[..., 10:12] = 0  # 32 frames in 16 stretches: the sixth
        rest = own.model(inputs).softmax(1)[0]
    best = int(whole.argmax())
    assert answer["label"] == own.class_names[best]
    assert answer["drop"][0][5] == pytest.approx(float(whole[best] - rest[best]), abs=1e-5)


def test_the_view_is_the_picture_that_the_model_hears(sound_server):
    port, _ = sound_server
    for data, seconds in (
        (clip(1)[:400], None),
        (as_wav(tone(1, RATE)[:900], RATE), 0.34),
        (clip(1, RATE), len(tone(1, RATE)) / RATE),
    ):
        status, _, answer = ask(port, "/view", data)
        assert status == (415 if seconds is None else 200)
        if seconds is not None:
            assert answer["seconds"] == pytest.approx(seconds, abs=0.011)  # whole frames
            image = Image.open(io.BytesIO(base64.b64decode(answer["png"])))
            assert image.size == (answer["width"], answer["height"])
            assert answer["height"] == 40
            assert np.asarray(image).max() > 150


def test_it_says_that_it_takes_sounds_and_that_it_is_ready(sound_server):
    port, _ = sound_server
    info = ask(port, "/info")[2]
    assert (info["modality"], info["rate"], info["frames"], info["max_seconds"]) == (
        "sounds",
        RATE,
        FRAMES,
        1,
    )
    assert ask(port, "/ready")[0] == 200


def test_an_image_has_a_view_too(tmp_path):
    with serving("mixer_cifar:cifar10") as (port, _):
        data = picture(2, size=(32, 32))
        answer = ask(port, "/view", data)[2]
        shown = Image.open(io.BytesIO(base64.b64decode(answer["png"])))
        assert (np.asarray(shown) == np.asarray(Image.open(io.BytesIO(data)))).all()
        assert answer["seconds"] is None


class Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_predict_reads_one_file_from_standard_input(sound_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.wav").write_bytes(clip(1))
    expected = [row["predictions"] for row in load(sound_run).predict([clip(1), clip(2)])]
    monkeypatch.setattr(Context, "json", True)
    monkeypatch.setattr(sys, "stdin", Stdin(clip(2)))
    assert run_command(["predict", str(sound_run), "-", str(tmp_path / "a.wav")]) == 0
    rows = json.loads(capsys.readouterr().out)["sounds"]
    assert [row["path"] for row in rows] == [str(tmp_path / "a.wav"), "-"]
    for row, one in zip(rows, expected, strict=True):
        same(row["predictions"], one)
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    assert run_command(["predict", str(sound_run), "-"]) == 1
    assert "empty" in json.loads(capsys.readouterr().out)["sounds"][0]["error"]


def test_predict_takes_no_other_name_with_a_hyphen():
    with pytest.raises(UsageError, match='Unknown option: "--tpo"'):
        run_command(["predict", "run", "--tpo", "3", "x.png"])
    with pytest.raises(UsageError, match="is there twice"):
        run_command(["predict", "run", "-", "-"])
