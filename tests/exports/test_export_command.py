"""`mixlab export`, `package` and `card`: what leaves is what was trained, and opens where mixlab is not."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mixlab
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.permute import permute_weights
from mixlab.checkpoint.store import Weights, save_weights
from mixlab.cli import run_command
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.images.samples import sample_images
from mixlab.errors import MixlabError, UsageError
from mixlab.exports import export as exporting
from mixlab.exports.card import write_card
from mixlab.exports.export import export, open_exported
from mixlab.exports.graph import Scale
from mixlab.models.catalog import create_model, settings_of
from mixlab.report.screen import Screen
from tests.forked import mixlab as command

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


def weights_of(name="mixer_pico4", size=(24, 24), channels=3, **preprocess):
    torch.manual_seed(0)
    small = (
        {"stage_blocks": (1, 1)} if "pyramid" in name else {"num_blocks": 2}
    )  # exports take time by the block
    model = create_model(name, num_classes=4, image_size=size, in_channels=channels, **small).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shape = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    return Weights(
        model=model,
        model_settings=settings_of(model.config),
        preprocess=ImagePreprocess(image_size=size, channels=channels, **shape | preprocess),
        class_names=("ant", "bee", "cow", "dog <&>"),
        provenance={"data": "nothing"},
    )


PICTURES = sample_images(70, (24, 24))


@pytest.mark.parametrize(
    "to", [to if to == "onnx" else pytest.param(to, marks=pytest.mark.slow) for to in exporting.ENDINGS]
)
@pytest.mark.parametrize(
    ("name", "channels", "batch"),
    [
        ("mixer_pico4", 3, None),
        pytest.param("mixer_pyramid_micro2", 3, None, marks=pytest.mark.slow),
        pytest.param("mixer_pico4", 1, 5, marks=pytest.mark.slow),
    ],
)
def test_what_is_written_answers_as_the_model_does(to, name, channels, batch, tmp_path):
    weights = weights_of(name, channels=channels)
    path = tmp_path / f"model{exporting.ENDINGS[to]}"
    result = export(weights, path, to=to, examples=PICTURES, batch=batch)
    assert result["max_difference"] <= 1e-4 * max(result["largest_logit"], 1)
    assert result["same_top1"] == result["num_compared"] >= 70
    assert result["batches"] == ([1, 3, 64] if batch is None else [5])
    pixels = np.stack([weights.preprocess.keep(p).transpose(1, 2, 0) for p in PICTURES[: batch or 7]])
    with torch.inference_mode():
        image = weights.preprocess.to_input(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        expected = weights.model(image).numpy()
    np.testing.assert_allclose(open_exported(path, to)(pixels), expected, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Weights, and the ONNX model of them."""
    weights, path = weights_of(crop_fraction=0.875), tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(weights, path, to="onnx", examples=PICTURES[:3])
    return weights, path


def test_classes_and_preprocessing_travel_inside(written):
    weights, path = written
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["mixlab"])
    assert about["class_names"] == list(weights.class_names)
    assert ImagePreprocess.from_json(about["preprocess"]) == weights.preprocess
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [24, 24, 3])


@pytest.mark.slow
def test_classes_travel_inside_other_formats_too(tmp_path):
    weights = weights_of()
    export(weights, tmp_path / "ov", to="openvino", examples=PICTURES[:3])
    import openvino

    model = openvino.Core().read_model(tmp_path / "ov" / "model.xml")
    assert json.loads(model.get_rt_info(["mixlab"]).astype(str))["class_names"] == list(weights.class_names)
    export(weights, tmp_path / "model.pt2", to="torch-export", examples=PICTURES[:3])
    extra = {"mixlab": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["mixlab"])["class_names"] == list(weights.class_names)


def test_permuted_weights_permute_inside_the_graph(tmp_path):
    permuted, _ = permute_weights(weights_of(), seed=1)
    export(permuted, tmp_path / "model.onnx", to="onnx", examples=PICTURES[:5])
    pixels = np.stack([permuted.preprocess.keep(p).transpose(1, 2, 0) for p in PICTURES[:5]])
    with torch.inference_mode():
        original = weights_of()
        expected = original.model(
            original.preprocess.to_input(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        )
    found = open_exported(tmp_path / "model.onnx", "onnx")(pixels)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_what_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    real = exporting.OPENERS["onnx"]
    for wrong in (lambda logits: logits + 0.01, lambda logits: -logits, lambda logits: logits * np.nan):
        monkeypatch.setitem(exporting.OPENERS, "onnx", lambda path, wrong=wrong: (
            lambda pixels: wrong(real(path)(pixels))
        ))  # fmt: skip
        with pytest.raises(MixlabError, match="something else"):
            export(weights_of(), tmp_path / "model.onnx", to="onnx", examples=PICTURES[:5])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fit", ["crop", "stretch", "resize-crop"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [3, 1])
def test_scaling_in_tensors_is_pillows(fit, interpolation, channels):
    preprocess = ImagePreprocess(
        image_size=(24, 32), channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels,
        fit=fit, interpolation=interpolation, crop_fraction=0.875,
    )  # fmt: skip
    scale, worst = Scale(preprocess), 0
    rng = np.random.default_rng(0)
    noise = [
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((24, 32), (7, 9), (25, 301), (301, 25))
    ]
    # Of tall ones Pillow 13 takes the columns first, and clips on the way: another order is seen in noise.
    for picture in [*PICTURES[:20], *noise]:
        found = scale(torch.from_numpy(picture)).numpy()
        expected = preprocess.keep(picture).transpose(1, 2, 0)
        worst = max(worst, int(np.abs(found - expected).max()))
    assert worst <= 1


@pytest.mark.parametrize("to", ["onnx", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_a_graph_that_scales_takes_pictures_of_any_size(to, tmp_path):
    path = tmp_path / "model"
    result = export(weights_of(crop_fraction=0.9), path, to=to, examples=PICTURES, resize_in_graph=True)
    assert result["max_pixel_difference"] <= 2
    assert result["agreement"] >= 0.99
    run = open_exported(path, to)
    assert {run(picture).shape for picture in PICTURES[:10]} == {(1, 4)}


def test_what_cannot_be_exported_is_said(tmp_path):
    weights = weights_of()
    for options, where in (
        ({"to": "tflite"}, "--to"), ({"to": "onnx", "batch": 0}, "--batch"),
        ({"to": "onnx", "batch": 2, "resize_in_graph": True}, "--batch"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as error:
            export(weights, tmp_path / "x", examples=PICTURES[:2], **options)
        assert error.value.where == where
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        export(weights, tmp_path / "there", to="onnx", examples=PICTURES[:2])
    assert (tmp_path / "there").read_text() == "mine"


def trained(folder, steps):
    mixlab.train("digits", "digits", run=folder, screen=Screen(quiet=True), figures=False, steps=steps)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "digits", steps=10)


@pytest.mark.slow
def test_a_run_in_eight_bits_keeps_its_accuracy(tmp_path_factory, tmp_path):
    run = trained(tmp_path_factory.mktemp("runs") / "digits", steps=100)
    done = command("export", run, "--int8", "--out", tmp_path / "small.onnx", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = result["int8"]
    assert found["top1_before"] - found["top1_after"] <= 0.003
    assert found["num_int8"] + found["num_float32"] == len(found["products"])
    assert found["num_bytes_after"] < found["num_bytes_before"]
    ends = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    test = next(row for row in ends if row["event"] == "end")["test"]
    assert found["test_before"] == pytest.approx(test["num_correct"] / test["num_images"])
    ops = {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    assert "QuantizeLinear" in ops
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.onnx.json"]
    record = json.loads((tmp_path / "small.onnx.json").read_text())
    assert record == result | {
        "destination": "small.onnx"
    }  # which may be sent with the model: no place in it


@pytest.mark.slow
def test_a_package_needs_neither_mixlab_nor_torch(run, tmp_path):
    done = command("package", run, "--out", tmp_path / "digits.zip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "digits.zip") as archive:
        assert {member.external_attr >> 16 for member in archive.infolist()} == {
            0o100644
        }  # for everybody to read
        archive.extractall(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.onnx",
        "predict.py",
        "requirements.txt",
        "README.md",
    }
    rng = np.random.default_rng(0)
    names = []
    for number, (size, mode) in enumerate((((8, 8), "L"), ((90, 41), "RGB"), ((33, 64), "RGBA"))):
        pixels = rng.integers(
            0, 256, (*size, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8
        ).squeeze()
        Image.fromarray(pixels, mode if mode != "L" else None).save(tmp_path / f"{number}.png")
        names.append(str(tmp_path / f"{number}.png"))
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    names.append(str(tmp_path / "deep.png"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    bad = [str(tmp_path / name) for name in ("bad.png", "float.tif", "bomb.png")]
    code = "import sys; sys.modules['torch'] = sys.modules['mixlab'] = None; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"  # noqa: E501
    program = str(tmp_path / "out" / "predict.py")
    code = f"import sys; sys.argv[0] = {program!r}; {code}"
    told = subprocess.run([sys.executable, "-c", code, *bad, *names], capture_output=True, text=True)
    assert told.returncode == 1, told.stderr
    assert all(name in told.stderr for name in bad)
    assert "Traceback" not in told.stderr
    assert len(told.stdout.splitlines()) == len(names)
    assert len((tmp_path / "out" / "predict.py").read_text().splitlines()) <= 60
    card = (tmp_path / "out" / "README.md").read_text()
    assert "python predict.py photo.jpg" in card
    assert "pip install mixlab" not in card
    alone = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert alone.returncode == 1
    assert "python predict.py picture.jpg" in alone.stderr
    classifier = mixlab.load(run)
    for line, row in zip(told.stdout.splitlines(), classifier.predict(names), strict=True):
        best = row["predictions"][0]
        assert line.startswith(f"{row['path']}: {best['label']} {100 * best['probability']:.1f} %")


def test_a_card_says_what_was_measured_and_no_more(run, tmp_path):
    done = command("card", run, "--licence", "apache-2.0", "--data-name", "digits", "--json", cwd=tmp_path)
    card = json.loads(done.stdout)["card"]
    ends = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    test = next(row for row in ends if row["event"] == "end")["test"]
    assert f"Test accuracy {100 * test['num_correct'] / test['num_images']:.2f} %" in card
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert 'name = "digits"' in card
    assert "pip install mixlab" not in card  # until it can be installed so
    assert f"steps = {next(row for row in ends if row['event'] == 'end')['step']}\n" in card
    assert "\nepochs = " not in card  # those of the plan
    assert f"torch {torch.__version__.split('+')[0]}" in card
    save_weights(tmp_path / "bare", weights_of())
    done = command("card", tmp_path / "bare", "--json", cwd=tmp_path)
    card = json.loads(done.stdout)["card"]
    assert "Not yet measured." in card
    assert "Not known: these are weights without their run." in card
    assert r"ant, bee, cow, dog \<\&\>" in card  # as Markdown shows the name


@pytest.mark.parametrize(
    ("given", "written"), [("Apache-2.0", "apache-2.0"), ("CC BY 4.0", "cc-by-4.0"), ("other", "other")]
)
def test_a_licence_is_written_as_the_hub_writes_it(given, written):
    head = write_card(weights_of(), None, licence=given).split("\n---\n")[0]
    assert yaml.safe_load(head.removeprefix("---\n"))["license"] == written


def test_a_licence_that_nobody_stated_is_unknown():
    card = write_card(weights_of(), None)
    assert card.startswith("---\nlicense: unknown\n")
    assert "- Licence of the weights: not stated" in card


def test_a_licence_that_the_hub_does_not_know_is_refused_with_the_nearest(tmp_path):
    for name in ("card", "package", "push"):
        options = ["--folder", "pushed"] if name == "push" else []
        told = command(name, "mixer_cifar:cifar10", "--licence", "apache2", *options, cwd=tmp_path)
        assert told.returncode == 2
        assert "did you mean apache-2.0?" in " ".join(told.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_model_has_plain_keys_that_other_programs_read(written):
    weights, path = written
    found = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert json.loads(found["class_names"]) == list(weights.class_names)
    assert json.loads(found["input_size"]) == list(weights.preprocess.image_size)
    assert tuple(json.loads(found["mean"])) == weights.preprocess.mean
    assert tuple(json.loads(found["std"])) == weights.preprocess.std
    assert found["version"] == mixlab.__version__
    assert found["model"] == json.loads(found["mixlab"])["model"]


def test_the_card_that_stands_beside_weights_is_theirs(tmp_path):
    told = command("card", "mixer_pyramid_cifar:cifar10", "--json", cwd=tmp_path)
    card = json.loads(told.stdout)["card"]
    assert "Test accuracy 89.18 %" in card
    assert "- Licence of the weights: apache-2.0" in card
    told = command("push", "mixer_pyramid_cifar:cifar10", "--folder", tmp_path / "pushed", "--licence", "mit",
                   "--data-name", "small images", cwd=tmp_path)  # fmt: skip
    assert told.returncode == 0, told.stderr
    changed = (tmp_path / "pushed" / "README.md").read_text()
    assert "license: mit" in changed
    assert "- Licence of the weights: mit" in changed
    assert "- Data: small images" in changed
    assert "Test accuracy 89.18 %" in changed
    (tmp_path / "pushed" / "README.md").write_text("# Somebody else's\n")
    told = command("card", tmp_path / "pushed", "--json", cwd=tmp_path)
    assert "Not yet measured." in json.loads(told.stdout)["card"]


def test_pictures_in_class_folders_are_split_and_few_of_them_are_called_few(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / "weights", weights_of())
    names = ("ant", "bee")
    for number, name in enumerate(names):
        (tmp_path / "few" / name).mkdir(parents=True)
        for picture in range(20):
            color = (10 * picture, 100, 200 * number)
            Image.new("RGB", (32, 32), color).save(tmp_path / "few" / name / f"{picture}.png")
    assert run_command(["export", "weights", "--int8", "--data", "few"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "accuracy, train (" in text
    assert "a change of a point may be chance" in text
    record = json.loads((tmp_path / "weights.onnx.json").read_text())
    assert record["int8"]["judged_on"] == "train"
    assert record["same_top1"] == record["num_compared"]
    with pytest.raises(UsageError) as error:
        run_command(["export", "weights", "--int8", "--out", "b.onnx"])
    assert "--data FOLDER" in error.value.hint
    assert (
        run_command(["export", "weights", "--resize-in-graph", "--pictures", "few/bee", "--out", "c.onnx"])
        == 0
    )
    assert "on fewer than 1,000 images" in " ".join(capsys.readouterr().out.split())


def test_a_repository_loads_in_timm_and_an_upload_has_the_same_files(run, tmp_path, monkeypatch):
    import huggingface_hub
    import timm

    import mixlab.timm  # noqa: F401  registers the architecture
    from mixlab.exports.push import push, write_repository

    weights = open_weights(run)
    result = write_repository(weights, tmp_path / "repository", "# a card\n")
    assert result["files"] == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{tmp_path / 'repository'}", pretrained=True).eval()
    image = torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model(image), weights.model(image))
    taken = {}

    class Hub:
        def create_repo(self, name, *, private, exist_ok):
            taken["made"] = (name, private, exist_ok)
            return f"https://hub.example/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            taken[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    told = push(weights, "me/my-mixer", "# a card\n", private=True)
    assert taken["made"] == ("me/my-mixer", True, True)
    same = {path.name: path.read_bytes() for path in (tmp_path / "repository").iterdir()}
    assert taken["me/my-mixer"] == same
    assert told["url"].endswith("me/my-mixer")

    def refuse(self, *arguments, **options):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(MixlabError, match="401 Unauthorized") as error:
        push(weights, "me/my-mixer", "# a card\n")
    assert "--folder" in error.value.hint
    with pytest.raises(UsageError, match="no OWNER/NAME"):
        push(weights, "../etc", "")
    with pytest.raises(UsageError, match="exists already"):
        write_repository(weights, tmp_path / "repository", "")
