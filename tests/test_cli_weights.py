"""The commands about weights, as a person types them, against real files and a server on this machine."""

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.checkpoint.convert import convert
from mixlab.checkpoint.foreign import usual_class_names
from mixlab.checkpoint.layouts import LAYOUTS
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.images.decode import decode
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.models.catalog import create_model, settings_of
from tests.forked import mixlab


def answer(result: subprocess.CompletedProcess, status: int = 0) -> dict:
    assert result.returncode == status, result.stdout + result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an official file of a drawn Mixer for 16 x 16 pixels, three classes of images, and a photo."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = create_model("mixer_custom4", image_size=16, num_classes=3, num_blocks=2, hidden_dim=16,
                         token_mlp_dim=8, channel_mlp_dim=24).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    keys = LAYOUTS["official"].keys(2)
    arrays = {keys[n]: LAYOUTS["official"].to_theirs(n, t).numpy() for n, t in model.state_dict().items()}
    np.savez(folder / "mixer.npz", **arrays)
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(15):
            pixels = rng.integers(0, 150, (20, 16, 3))
            pixels[..., number] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / name / f"{i:02}.png")
    Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    return folder


def test_convert_says_what_the_source_is_and_what_was_assumed(place, tmp_path):
    result = mixlab("convert", place / "mixer.npz", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("the authors' .npz", "assumed: gelu tanh", "hidden_dim", "read back identical"):
        assert text in result.stdout
    facts = answer(mixlab("info", "out", "--json", cwd=tmp_path))
    assert facts["num_parameters"] == sum(a.size for a in np.load(place / "mixer.npz").values())
    assert facts["provenance"]["assumed"]["gelu"] == "tanh"
    useless = mixlab("info", "out", "--num-classes", "7", cwd=tmp_path)
    assert useless.returncode == 2
    again = mixlab("convert", "out", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_convert_refuses_another_gelu_unless_accepted_and_then_shows_the_difference(place, tmp_path):
    arguments = ("convert", place / "mixer.npz", "w.pth", "--format", "lucidrains")
    refused = mixlab(*arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--accept-gelu-change" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    values = answer(mixlab(*arguments, "--accept-gelu-change", "--json", cwd=tmp_path))
    assert 0 < values["change"]["max_difference"] < 0.1
    assert json.loads((tmp_path / "w.pth.json").read_text())["change"] == values["change"]


def test_convert_names_the_keys_that_are_wrong(place, tmp_path):
    arrays = dict(np.load(place / "mixer.npz"))
    del arrays["MixerBlock_1/LayerNorm_0/scale"]
    arrays["extra/kernel"] = np.zeros((2, 3), np.float32)
    arrays["head/kernel"] = arrays["head/kernel"].T
    np.savez(tmp_path / "wrong.npz", **arrays)
    result = mixlab("convert", "wrong.npz", "out", cwd=tmp_path)
    assert result.returncode == 1
    for text in ("missing: MixerBlock_1/LayerNorm_0/scale (16,)", "not expected: extra/kernel (2, 3)",
                 "head/kernel: has (3, 16), needs (16, 3)"):  # fmt: skip
        assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_permute_prints_the_proof_and_the_new_weights_answer_alike(place, tmp_path):
    values = answer(
        mixlab("permute", place / "mixer.npz", "--seed", "3", "--out", "permuted", "--json", cwd=tmp_path)
    )
    assert values["holds"]
    assert values["max_difference"] < 1e-12 < 1e-2 < values["control"]
    answers = [
        answer(mixlab("predict", weights, place / "photo.jpg", "--json", cwd=tmp_path))
        for weights in (place / "mixer.npz", "permuted")
    ]
    rows = [found["images"][0]["predictions"] for found in answers]
    assert [row["label"] for row in rows[0]] == [row["label"] for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)
    assert mixlab("permute", "permuted", "--out", "twice", cwd=tmp_path).returncode == 2


def test_predict_evaluate_and_fewshot_take_a_bare_file_at_any_size(place, tmp_path):
    weights = place / "mixer.npz"
    values = answer(
        mixlab("predict", weights, place / "photo.jpg", "--image-size", "20x32", "--json", cwd=tmp_path)
    )
    assert len(values["images"][0]["predictions"]) == 3
    values = answer(
        mixlab("fewshot", weights, place / "data", "--shots", "1,5", "--seeds", "2", "--json", cwd=tmp_path)
    )
    assert [row["shots"] for row in values["shots"]] == [1, 5]
    assert values["shots"][1]["top1"] > 1 / 3
    assert values["num_features"] == 16
    wrong = mixlab("fewshot", weights, place / "data", "--shots", "one", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "list of numbers" in wrong.stderr
    odd = mixlab("predict", weights, place / "photo.jpg", "--image-size", "18", cwd=tmp_path)
    assert odd.returncode == 2
    assert "multiple of patch_size 4" in odd.stderr


def test_train_starts_from_a_file_and_evaluate_takes_the_run_at_another_size(place, tmp_path):
    result = answer(
        mixlab("train", place / "data", "--init-from", place / "mixer.npz", "--image-size", "24x16",
               "--steps", "3", "--run", "run", "--threads", "1", "--without-figures", "--json", cwd=tmp_path)
    )  # fmt: skip
    config = json.loads((tmp_path / result["run"] / "config.json").read_text())
    assert (config["model"]["hidden_dim"], config["model"]["image_size"]) == (16, [24, 16])
    values = answer(mixlab("evaluate", "run", "--image-size", "32", "--json", cwd=tmp_path))
    assert values["num_images"] == result["test"]["num_images"]
    assert values["fit"] is None
    values = answer(mixlab("evaluate", "run", "--fit", "resize-crop", "--json", cwd=tmp_path))
    assert values["fit"] == "resize-crop"
    assert values["loss"] != result["test"]["loss"]
    unnamed = mixlab("evaluate", "run", "--labels", "real", cwd=tmp_path)
    assert unnamed.returncode == 1
    assert "ILSVRC2012_val_00000001" in unnamed.stderr


def test_the_table_of_published_weights_has_every_fact(place):
    rows = answer(mixlab("models", "--pretrained", "--json", cwd=place))["pretrained"]
    by_name = {row["name"]: row for row in rows}
    row = by_name["mixer_b16:imagenet1k"]
    assert row["url"].endswith("imagenet1k/Mixer-B_16.npz")
    assert (row["size_mib"], row["num_classes"], row["gelu"]) == (228.47, 1000, "tanh")
    assert (row["top1"], row["input_range"]) == (76.44, "[-1, 1]")
    assert by_name["timm/mixer_b16_224.miil_in21k"]["input_range"] == "[0, 1]"
    assert "ImageNet-1k-only" in by_name["timm/mixer_b16_224.goog_in21k_ft_in1k"]["provenance"]
    shown = mixlab("models", "--pretrained", cwd=place, COLUMNS="200").stdout
    assert "mixer_l16:imagenet21k" in shown


@pytest.fixture
def serve():
    """A function that answers requests of the path -> (headers, body) it is given, on this machine."""
    servers = []

    def start(files: dict[str, tuple[dict[str, str], bytes]]) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, with_body: bool) -> None:
                asked.append(self.path)
                if self.path.split("?")[0] not in files:
                    self.send_error(404)
                    return
                headers, body = files[self.path.split("?")[0]]
                self.send_response(200)
                for key, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def do_GET(self):
                self.answer(with_body=True)

            def do_HEAD(self):
                self.answer(with_body=False)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_published_name_is_all_that_predict_needs(place, tmp_path, serve):
    """A file of S/16's real size, since the size is checked, with drawn numbers."""
    torch.manual_seed(0)
    model = create_model("mixer_s16").eval()
    torch.nn.init.normal_(model.head.weight)
    keys = LAYOUTS["official"].keys(8)
    path = tmp_path / "made.npz"
    np.savez(
        path, **{keys[n]: LAYOUTS["official"].to_theirs(n, t).numpy() for n, t in model.state_dict().items()}
    )
    content = path.read_bytes()
    assert abs(len(content) / 2**20 - 70.71) < 0.005  # the published file's, in two digits
    url, asked = serve({"/gsam/Mixer-S_16.npz": ({"ETag": '"x"'}, content)})
    environment = {"MIXLAB_MIRROR": url, "MIXLAB_CACHE": str(tmp_path / "cache")}
    command = ("predict", "mixer_s16:gsam", place / "photo.jpg", "--json")
    values = answer(mixlab(*command, cwd=tmp_path, **environment))
    assert len(values["images"][0]["predictions"]) == 5
    preprocess = ImagePreprocess(image_size=(224, 224), crop_fraction=0.875)
    pixels = torch.from_numpy(preprocess.keep(decode(place / "photo.jpg")))[None]
    expected = int(model(preprocess.to_input(pixels)).argmax())
    assert values["images"][0]["predictions"][0]["label"] == usual_class_names(1000)[expected]
    assert asked == ["/gsam/Mixer-S_16.npz"]
    assert answer(mixlab(*command, cwd=tmp_path, **environment, MIXLAB_OFFLINE="1")) == values
    elsewhere = mixlab(
        "info", "timm/mixer_b16_224.goog_in21k", cwd=tmp_path, **environment, MIXLAB_OFFLINE="1"
    )
    assert elsewhere.returncode == 1  # the published weights, not timm's architecture
    missing = mixlab("predict", "mixer_s32:gsam", place / "photo.jpg", cwd=tmp_path, **environment)
    assert missing.returncode == 1
    assert "404" in missing.stderr
    assert "put it at" in missing.stderr


def test_timms_weights_come_from_the_hub_through_its_own_library(place, tmp_path, serve):
    """A small folder in timm's format under timm's name, served as the Hub serves it."""
    torch.manual_seed(0)
    narrow = {"token_mlp_dim": 8, "channel_mlp_dim": 64}
    model = create_model("mixer_s32", image_size=(64, 32), num_classes=3, gelu="erf", **narrow).eval()
    weights = Weights(
        model=model, model_settings=settings_of(model.config), class_names=("a", "b", "c"), provenance={},
        preprocess=ImagePreprocess(image_size=(64, 32), crop_fraction=0.875),
    )  # fmt: skip
    convert(weights, tmp_path / "folder", format="timm")
    name, commit = "timm/mixer_b16_224.miil_in21k", "0" * 40
    siblings = [{"rfilename": f} for f in ("config.json", "model.safetensors", "pytorch_model.bin")]
    listing = {"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
    files = {
        f"/api/models/{name}/revision/main": (
            {"Content-Type": "application/json"}, json.dumps(listing).encode()
        )
    }  # fmt: skip
    tree = []
    for number, path in enumerate(sorted((tmp_path / "folder").iterdir())):
        headers = {"ETag": f'"{number:040}"', "X-Repo-Commit": commit}
        files[f"/{name}/resolve/{commit}/{path.name}"] = (headers, path.read_bytes())
        tree.append({"type": "file", "path": path.name, "size": path.stat().st_size, "oid": f"{number:040}"})
    tree.append({"type": "file", "path": "pytorch_model.bin", "size": 5, "oid": "f" * 40})
    files[f"/api/models/{name}/tree/{commit}"] = (
        {"Content-Type": "application/json"}, json.dumps(tree).encode()
    )  # fmt: skip
    url, asked = serve(files)
    environment = {"HF_ENDPOINT": url, "MIXLAB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    command = ("predict", name, place / "photo.jpg", "--json")
    values = answer(mixlab(*command, cwd=tmp_path, **environment))
    assert {row["label"] for row in values["images"][0]["predictions"]} == {"a", "b", "c"}
    assert not any("pytorch_model.bin" in path for path in asked)
    assert answer(mixlab(*command, cwd=tmp_path, **environment | {"HF_HUB_OFFLINE": "1"})) == values
    again = open_weights(tmp_path / "cache" / name)
    assert torch.equal(again.model.stem.weight, model.stem.weight)
