"""Wheels that hold pieces of a made-up model, in a folder that pip takes for its index."""

import zipfile
from hashlib import sha256

from paceline.models.known_models import KnownModel, WheelPart


def write_wheel(folder, package, members, version="1.0"):
    """Write a wheel whose archive has these members, by name; return its path."""
    stem = f"{package.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    texts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        f"{info}/WHEEL": wheel,
        f"{info}/RECORD": "",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **texts}.items():
            archive.writestr(name, content)
    return path


def part_of(package, content, member="data/piece", version="1.0"):
    return WheelPart(package, version, member, len(content), sha256(content).hexdigest(), 4096)


def known(parts, content, name="toy-model", **more):
    """Return a model of the catalogue whose file is `content`."""
    digest = sha256(content).hexdigest()
    return KnownModel(
        name, "A toy", "toy.gguf", len(content), digest, "MIT", "there", True, None, parts, **more
    )
