"""Published weights: the table against models, timm and formats; downloads from a real server that misbehaves."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from PIL import Image

import mixlab
from mixlab.checkpoint import download
from mixlab.checkpoint.download import fetch_published, list_published
from mixlab.checkpoint.published import OFFICIAL_URL, PUBLISHED, find_published
from mixlab.errors import DiskError, UsageError, WeightsError
from mixlab.models.catalog import create_model
from mixlab.report.screen import Screen

CONTENT = bytes(range(256)) * 400  # 100 KiB
ENTRY = replace(PUBLISHED["mixer_b16:imagenet1k"], size_mib=len(CONTENT) / 2**20)


class Server:
    """What it serves, how it misbehaves (one entry a request, the last one for good), and what it was asked."""

    def __init__(self) -> None:
        self.content, self.etag, self.ranges = CONTENT, '"one"', True
        self.behaviour: list = ["serve"]
        self.asked: list[tuple[str, str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.asked.append((self.path, self.headers.get("Range")))
                what = server.behaviour.pop(0) if len(server.behaviour) > 1 else server.behaviour[0]
                server.answer(self, what)

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()

    def answer(self, request, what) -> None:
        if isinstance(what, int):
            request.send_error(what)
            return
        if isinstance(what, str) and "://" in what:
            request.send_response(302)
            request.send_header("Location", what)
            request.end_headers()
            return
        start, content = 0, self.content
        wanted = request.headers.get("Range")
        if wanted and self.ranges and request.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        request.send_response(206 if start else 200)
        request.send_header("ETag", self.etag)
        body = content[start:]
        if what == "too much":
            body += bytes(100_000)
        elif what != "no length":
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if what == "cut":
            body = body[: len(body) // 2]
        with contextlib.suppress(OSError):
            request.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    found = Server()
    monkeypatch.setenv("MIXLAB_MIRROR", found.url)
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    for name in ("MIXLAB_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.httpd.shutdown()
    found.httpd.server_close()


def fetch(**options):
    return fetch_published(ENTRY, pause=0.001, **options)


def names(folder) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_download_is_whole_recorded_and_asked_for_once(server, tmp_path):
    seen = []
    path = fetch(progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "cache" / "imagenet1k" / "Mixer-B_16.npz"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    record = json.loads((path.parent / "Mixer-B_16.npz.json").read_text())
    assert record["size"] == len(CONTENT)
    assert len(record["sha256"]) == 64
    assert fetch() == path
    assert server.asked == [("/imagenet1k/Mixer-B_16.npz", None)]
    assert names(path.parent) == {"Mixer-B_16.npz", "Mixer-B_16.npz.json", "Mixer-B_16.npz.lock"}


def test_a_cut_connection_goes_on_where_it_stopped(server):
    server.behaviour = ["cut", "cut", "serve"]
    assert fetch().read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=51200-", "bytes=76800-"]


def test_a_download_that_failed_goes_on_in_the_next_call(server):
    server.behaviour = ["cut", 503]
    with pytest.raises(WeightsError, match="51200 bytes are here") as error:
        fetch()
    assert "try again" in error.value.hint
    assert "put it at" in error.value.hint
    server.behaviour = ["serve"]
    assert fetch().read_bytes() == CONTENT
    assert server.asked[-1][1] == "bytes=51200-"


def test_a_server_without_ranges_or_with_another_file_starts_again(server):
    server.behaviour, server.ranges = ["cut", "serve"], False
    assert fetch().read_bytes() == CONTENT


def test_a_file_that_changed_between_two_tries_is_not_mixed(server):
    server.behaviour = ["cut", 503]
    with pytest.raises(WeightsError):
        fetch()
    server.content, server.etag, server.behaviour = CONTENT[::-1], '"two"', ["serve"]
    assert fetch().read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_an_answer_that_will_not_change_is_not_asked_for_again(code, server, tmp_path):
    server.behaviour = [code]
    with pytest.raises(WeightsError, match=f"answered {code}") as error:
        fetch()
    assert len(server.asked) == 1
    assert "put it at" in error.value.hint
    assert error.value.where.startswith(server.url)
    assert "Mixer-B_16.npz" not in names(tmp_path)


def test_a_server_in_trouble_is_asked_again(server):
    server.behaviour = [500, 503, 429, "serve"]
    assert fetch().read_bytes() == CONTENT
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("what", "message"), [("serve", "offers"), ("no length", "sends more"), ("too much", "sends more")]
)
def test_a_wrong_size_is_refused(what, message, server, tmp_path):
    server.behaviour = [what]
    if what != "too much":
        server.content = CONTENT * 2
    with pytest.raises(WeightsError, match=message):
        fetch()
    assert names(tmp_path) <= {"Mixer-B_16.npz.lock", "Mixer-B_16.npz.part.json"}


def test_a_short_file_is_not_taken_for_whole(server, tmp_path):
    server.content, server.behaviour = CONTENT[:50_000], ["no length"]
    with pytest.raises(WeightsError, match="failed"):
        fetch()
    assert "Mixer-B_16.npz" not in names(tmp_path)


def test_redirects_are_followed_but_not_to_other_protocols_or_for_ever(server):
    server.behaviour = [f"{server.url}/elsewhere", "serve"]
    assert fetch().read_bytes() == CONTENT
    assert server.asked[1][0] == "/elsewhere"
    for place in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:x://y"):
        fetch().unlink()
        server.behaviour = [place]
        with pytest.raises(WeightsError):
            fetch()
        server.behaviour = ["serve"]
        fetch()


def test_an_endless_redirect_ends(server):
    server.behaviour = [f"{server.url}/round"]
    with pytest.raises(WeightsError):
        fetch()
    assert len(server.asked) < 100


@pytest.mark.parametrize("name", ["MIXLAB_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_nobody_and_uses_what_is_there(name, server, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(WeightsError, match=name) as error:
        fetch()
    assert OFFICIAL_URL in error.value.hint
    with pytest.raises(WeightsError, match="not on this machine"):
        fetch_published(PUBLISHED["timm/mixer_b16_224.goog_in21k"])
    assert not server.asked
    monkeypatch.delenv(name)
    fetch()
    monkeypatch.setenv(name, "1")
    assert fetch().read_bytes() == CONTENT


def test_nobody_there_is_said(server, monkeypatch):
    monkeypatch.setenv("MIXLAB_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="refused"):
        fetch()


def test_a_file_that_changed_later_is_refused_with_what_to_do(server):
    path = fetch()
    content = bytearray(CONTENT)
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="SHA-256 differs") as error:
        fetch()
    assert "delete it" in error.value.hint
    path.write_bytes(CONTENT[:5])
    with pytest.raises(WeightsError, match="5 bytes"):
        fetch()
    path.write_bytes(CONTENT)
    path.with_name(path.name + ".json").write_text("{")
    with pytest.raises(WeightsError, match="record"):
        fetch()


def test_a_file_put_there_by_hand_is_taken_and_recorded(server, tmp_path):
    path = tmp_path / "cache" / "imagenet1k" / "Mixer-B_16.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch() == path
    assert path.with_name(path.name + ".json").is_file()
    assert not server.asked


def test_a_full_disk_is_named_and_what_came_is_kept(server, monkeypatch, tmp_path):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 1000})())
    with pytest.raises(DiskError, match="No space left"):
        fetch()
    monkeypatch.undo()
    assert usage.f_bavail


@pytest.mark.skipif(sys.platform == "win32", reason="the file size is limited as POSIX does it")
def test_a_disk_that_fills_while_writing_is_named_and_the_next_call_goes_on(server, tmp_path):
    code = f"""
import resource, signal, sys
from dataclasses import replace
from mixlab.checkpoint.download import fetch_published
from mixlab.checkpoint.published import PUBLISHED
from mixlab.errors import DiskError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
entry = replace(PUBLISHED["mixer_b16:imagenet1k"], size_mib={len(CONTENT)} / 2**20)
try:
    fetch_published(entry, pause=0.001)
except DiskError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert os.strerror(errno.EFBIG) in output
    assert "Mixer-B_16.npz" not in names(tmp_path)
    assert fetch().read_bytes() == CONTENT


def test_two_at_once_download_once(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == CONTENT for path in found] == [True] * 4
    assert len(server.asked) == 1


def test_an_interrupted_download_leaves_no_file_under_its_name(server, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(progress=stop)
    assert "Mixer-B_16.npz" not in names(tmp_path)
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize("trouble", [None, OSError("no such repository"), ValueError("offline")])
def test_timms_folders_come_through_the_hub_library_without_pickles(trouble, server, tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot(repository, *, allow_patterns, local_dir):
        assert repository == "timm/mixer_b16_224.goog_in21k_ft_in1k"
        assert allow_patterns == ["config.json", "model.safetensors"]
        if trouble:
            raise trouble
        local_dir.mkdir(parents=True)
        (local_dir / "model.safetensors").write_bytes(b"x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    entry = PUBLISHED["timm/mixer_b16_224.goog_in21k_ft_in1k"]
    if trouble:
        with pytest.raises(WeightsError, match="did not give") as error:
            fetch_published(entry)
        assert "by hand" in error.value.hint
        return
    path = fetch_published(entry)
    assert path.is_relative_to(tmp_path / "cache")
    assert fetch_published(entry) == path


@pytest.mark.parametrize("name", [name for name, entry in PUBLISHED.items() if not entry.is_shipped])
def test_the_size_of_every_file_is_that_of_the_parameters_it_should_hold(name):
    entry = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(entry.model, num_classes=entry.num_classes)
    mib = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    assert entry.size_mib == pytest.approx(mib, abs=0.12)  # names and headers


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("timm/")])
def test_timms_entries_say_what_timm_says(name):
    entry, facts = PUBLISHED[name], timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert facts.hf_hub_id == name
    assert (entry.num_classes, entry.crop_fraction) == (facts.num_classes, facts.crop_pct)
    assert (entry.mean, entry.std, entry.interpolation) == (facts.mean, facts.std, facts.interpolation)


def test_every_name_says_its_model_and_unknown_ones_get_the_nearest():
    released = {name: entry for name, entry in PUBLISHED.items() if not entry.is_shipped}
    assert len(released) == 17
    for name, entry in released.items():
        assert entry.is_hub or name.startswith(f"{entry.model}:")
        assert entry.gelu == ("erf" if entry.is_hub else "tanh")
        assert "not downloaded" in entry.not_verified
    with pytest.raises(UsageError) as error:
        find_published("mixer_b16:imagenet")
    assert "did you mean 'mixer_b16:imagenet1k'" in error.value.hint
    assert "mixer_b16:gsam" in error.value.hint


def test_the_list_says_what_is_here(server):
    def cached():
        return [
            row["name"] for row in list_published() if row["cached"] and not PUBLISHED[row["name"]].is_shipped
        ]

    assert cached() == []
    fetch()
    assert cached() == ["mixer_b16:imagenet1k"]


def test_create_model_takes_published_weights_by_tag(server, monkeypatch):
    import numpy as np

    from mixlab.checkpoint.layouts import LAYOUTS

    torch.manual_seed(0)
    model = create_model("mixer_pico4", image_size=16, num_classes=6)
    torch.nn.init.normal_(model.head.weight)
    keys = LAYOUTS["official"].keys(4)
    path = fetch()
    with path.open("wb") as file:
        np.savez(
            file,
            **{keys[n]: LAYOUTS["official"].to_theirs(n, t).numpy() for n, t in model.state_dict().items()},
        )
    path.with_name(path.name + ".json").unlink()
    entry = replace(ENTRY, size_mib=path.stat().st_size / 2**20)
    monkeypatch.setitem(PUBLISHED, ENTRY.name, entry)
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(mixlab.create_model("mixer_b16", pretrained="imagenet1k")(image), model.eval()(image))
    other = mixlab.create_model("mixer_b16", pretrained="imagenet1k", num_classes=3, image_size=24)
    assert torch.equal(other(torch.randn(1, 3, 24, 24)), torch.zeros(1, 3))
    with pytest.raises(UsageError, match="hidden_dim"):
        mixlab.create_model("mixer_b16", pretrained="imagenet1k", hidden_dim=5)
    with pytest.raises(UsageError, match="no published weights"):
        mixlab.create_model("mixer_b16", pretrained="imagenet2k")
    with pytest.raises(UsageError, match="pretrained says zzz"):
        mixlab.create_model("timm/mixer_b16_224.goog_in21k", pretrained="zzz")


PINNED = replace(ENTRY, sha256=hashlib.sha256(CONTENT).hexdigest())


def test_a_file_of_the_right_size_that_is_another_one_is_refused_where_the_hash_is_known(server, tmp_path):
    assert fetch_published(PINNED).read_bytes() == CONTENT
    shutil.rmtree(tmp_path / "cache")
    server.content = CONTENT[::-1]
    with pytest.raises(WeightsError, match=r"what came is not mixer_b16:imagenet1k.*SHA-256"):
        fetch_published(PINNED)
    assert not list((tmp_path / "cache").rglob("*.npz"))
    place = tmp_path / "cache" / "imagenet1k" / "Mixer-B_16.npz"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(CONTENT[::-1])  # put there by hand
    with pytest.raises(WeightsError, match="not the published one"):
        fetch_published(PINNED)


def test_without_a_known_hash_it_is_said_to_be_unverified_with_the_address_it_came_from(server):
    path = fetch_published(ENTRY)
    facts, caution = download.origin_of(ENTRY, path)
    assert facts["url"] == f"{server.url}/imagenet1k/Mixer-B_16.npz"
    assert facts["is_verified"] is False
    assert caution.startswith("unverified: ")
    assert server.url in caution
    facts, caution = download.origin_of(PINNED, path)
    assert (facts["is_verified"], caution) == (True, None)


def test_a_file_put_there_by_hand_is_not_said_to_come_from_the_publisher(server, tmp_path):
    place = tmp_path / "cache" / "imagenet1k" / "Mixer-B_16.npz"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    facts, caution = download.origin_of(ENTRY, fetch_published(ENTRY))
    assert facts["url"] is None
    assert "put there by hand" in caution


@pytest.mark.parametrize("mirror", ["http://mirror.example.org/m", "ftp://mirror.example.org/m"])
def test_no_mirror_without_https_is_asked_where_the_hash_is_not_known(mirror, server, monkeypatch):
    monkeypatch.setenv("MIXLAB_MIRROR", mirror)
    with pytest.raises(WeightsError, match="over https only"):
        fetch_published(ENTRY)
    assert server.asked == []


def test_what_is_unverified_is_said_first_by_predict_and_in_provenance_and_card(tmp_path, monkeypatch):
    from mixlab.checkpoint.convert import convert
    from mixlab.checkpoint.open import open_weights
    from mixlab.checkpoint.store import Weights
    from mixlab.commands import using
    from mixlab.data.images.preprocess import ImagePreprocess
    from mixlab.exports.card import write_card

    settings = {
        "name": "mixer_custom16", "image_size": (32, 32), "num_classes": 10, "num_blocks": 1, "hidden_dim": 8,
        "token_mlp_dim": 4, "channel_mlp_dim": 8,
    }  # fmt: skip
    made = Weights(
        model=create_model(**settings), model_settings=settings, preprocess=ImagePreprocess(image_size=(32, 32)),
        class_names=tuple(map(str, range(10))), provenance={},
    )  # fmt: skip
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    entry = next(entry for entry in PUBLISHED.values() if entry.name == "mixer_s32:gsam")
    place = download._cache_path(entry)
    place.parent.mkdir(parents=True)
    convert(made, place, format="official")
    (place.parent / f"{place.name}.json").unlink()
    monkeypatch.setattr(download, "SIZE_TOLERANCE", 2**40)
    weights = open_weights(entry.name)
    assert weights.provenance["is_verified"] is False
    assert "unverified: nobody has stated the SHA-256" in write_card(weights, None)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    said = []
    monkeypatch.setattr(Screen, "say", lambda self, text="": said.append(text))
    using.predict(entry.name, str(tmp_path / "a.png"))
    assert said[0].startswith("note: unverified: ")
