"""Feed-forward layers with ReLU whose neurons lie in a file, but for those of recent tokens.

Where a neuron's input is not positive, ReLU makes it 0, and neither its row of the first matrix nor
its column of the second matters. In memory are a copy of the first matrix in 8 bits and a window of
neurons. The copy gives a bound of each neuron's input; neurons whose bound is above 0 are computed
from the rows and columns themselves, those that the window lacks being read. So no neuron that
contributes is left out, and only the order of sums differs from a layer in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple
from weakref import finalize
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.errors import ModelError
from paceline.models.blocks import ACTIVATIONS
from paceline.models.config import ModelConfig

FEWEST = 64  # neurons of a window; a layer that has fewer is in memory whole
_BLOCK = 512  # neurons that are screened together
_READERS = 4  # threads, so that a disk has several reads to do


def neuron_bytes(config: ModelConfig, size: int) -> int:
    """Return the bytes of the rows and columns of all neurons, `size` for each weight."""
    return 2 * size * config.hidden_size * sum(layer.intermediate for layer in config.layers)


class NeuronFile:
    """The rows and columns of all neurons, those of one neuron side by side.

    The file has no name while it is open, and vanishes with the process.

    Args:
        folder: where it lies.

    Attributes:
        read_bytes: so far.

    Raises:
        ModelError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.read_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"neurons-{os.getpid()}-{token_hex(4)}.tmp"
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            path.unlink()
        except OSError as error:
            raise self._error(f"{folder}: {error.strerror}") from None
        self._pool = ThreadPoolExecutor(_READERS, "paceline-neurons")
        self._end = 0
        finalize(self, _close, self.descriptor, self._pool)

    def append(self, bundles: NDArray[np.uint8]) -> int:
        """Write the bundles [F, B] of a layer, and return where they begin.

        Raises:
            ModelError: the disk is full, or fails.
        """
        start, data = self._end, np.ascontiguousarray(bundles).data.cast("B")
        try:
            while data:
                size = os.pwrite(self.descriptor, data[: 1 << 26], self._end)
                data, self._end = data[size:], self._end + size
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._error(str(error.strerror)) from None
        self._drop(start, self._end - start)
        return start

    def read(self, start: int, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Read bundles of a layer that begins at `start` into `out` [N, B].

        Args:
            start: of the layer.
            rows: numbers of the bundles, increasing.
            out: takes them.

        Raises:
            ModelError: the disk fails, or the file was shortened.
        """
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = list(zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True))
        size = out.shape[1]

        def read_run(run: tuple[int, int]) -> None:
            first, last = run
            offset = start + int(rows[first]) * size
            data = out[first:last].data.cast("B")
            place = offset
            while data:
                count = os.preadv(self.descriptor, [data], place)
                if not count:
                    raise OSError(None, "it is shorter than it was")
                data, place = data[count:], place + count
            self._drop(offset, place - offset)

        try:
            list(self._pool.map(read_run, runs))
        except OSError as error:
            raise self._error(str(error.strerror)) from None
        self.read_bytes += out.size

    def _drop(self, offset: int, size: int) -> None:
        """Let the system keep no copy of what was read."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    @staticmethod
    def _error(reason: str) -> ModelError:
        return ModelError(
            f"neurons cannot be kept in a file: {reason}; set XDG_CACHE_HOME to a folder with "
            "room on a disk that works"
        )


def _checksums(bundles: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return one of each row of [N, B]."""
    return np.array([crc32(each.data) for each in bundles], np.uint32)


def _close(descriptor: int, pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False)
    os.close(descriptor)


class Screen(NamedTuple):
    """A copy of a first matrix in 8 bits, and how far a product with it may be off.

    Attributes:
        codes: int8 [F, hidden].
        scales: float32 [F]; codes times scales are the rows.
        reach: float32 [F], of each row; times the length of an input it bounds the error.
        bias: float32 [F].
    """

    codes: Tensor
    scales: Tensor
    reach: Tensor
    bias: Tensor

    @classmethod
    def of(cls, matrix: Tensor, bias: Tensor | None) -> Screen:
        """Return the screen of a matrix [F, hidden] and its bias [F]."""
        width = matrix.shape[1] + 2
        # Rounding of a sum of products in float32 here, and in the matrix's type there.
        single, own = torch.finfo(torch.float32).eps, torch.finfo(matrix.dtype).eps
        slack = max(4 * width * single, 2 * own)
        codes, scales, reach = [], [], []
        for start in range(0, len(matrix), _BLOCK):
            rows = matrix[start : start + _BLOCK].double()
            scale = (rows.abs().amax(1) / 127).clamp(min=1e-30).float()
            code = (rows / scale.double()[:, None]).round()
            copied = code * scale.double()[:, None]
            error = (rows - copied).norm(dim=1)
            codes.append(code.to(torch.int8))
            scales.append(scale)
            reach.append(((error + slack * (copied.norm(dim=1) + error)) * 1.001).float())
        zeros = torch.zeros(len(matrix), device=matrix.device)
        added = zeros if bias is None else bias.float()
        added = added + slack * added.abs()
        return cls(torch.cat(codes), torch.cat(scales), torch.cat(reach), added)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(each.nbytes for each in self)

    def candidates(self, x: Tensor) -> NDArray[np.int64]:
        """Return which neurons may have an input above 0 at any of N positions, increasing.

        Args:
            x: [N, hidden].
        """
        wide = x.float()
        lengths = wide.norm(dim=1, keepdim=True)
        found = []
        for start in range(0, len(self.codes), _BLOCK):
            block = slice(start, start + _BLOCK)
            inputs = wide @ self.codes[block].float().T * self.scales[block] + self.bias[block]
            surely = inputs + lengths * self.reach[block] <= 0  # false for what is no number
            found.append(~surely.all(0))
        return torch.cat(found).cpu().numpy().nonzero()[0].astype(np.int64)


class NeuronWindow:
    """A feed-forward layer of whose F neurons those of recent tokens are in memory.

    Based on "LLM in a flash: Efficient Large Language Model Inference with Limited Memory"
    (Alizadeh et al. 2023, arXiv 2312.11514): 3.1 the window of recent tokens, of which only what is
    new is read, and 3.2 bundles of rows and columns. The paper's window has a number of tokens,
    this one a number of neurons, and those that were used longest ago leave it. Where the paper
    predicts active neurons by trained low-rank matrices, which miss some, a bound finds them all.

    Args:
        file: of the neurons.
        up: matrix [F, hidden].
        up_bias: [F]; None: zeros.
        down: matrix [hidden, F].
        down_bias: [hidden]; None: zeros.
        activation: of `ACTIVATIONS`, 0 where its input is not positive.

    Attributes:
        used: neurons that passes have computed.
        missed: those of them that were read.
    """

    def __init__(
        self,
        file: NeuronFile,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        activation: str,
    ) -> None:
        self._file, self._act = file, ACTIVATIONS[activation]
        self._up_bias, self._down_bias = up_bias, down_bias
        self.screen = Screen.of(up, up_bias)
        bundles = torch.cat([up, down.T], 1).cpu().contiguous().view(torch.uint8).numpy()
        self._start = file.append(bundles)
        self._sums = _checksums(bundles)
        self.neurons, self.bundle_bytes = bundles.shape
        self._hidden, self._dtype, self._device = up.shape[1], up.dtype, up.device
        self._slots = np.full(self.neurons, -1, np.int64)  # of each neuron; -1: it is not in memory
        self.used = self.missed = self._time = 0
        self.keep(0)

    def keep(self, count: int) -> None:
        """Keep room for so many neurons, none of which is in memory yet."""
        self._slots.fill(-1)
        self._held = np.full(count, -1, np.int64)  # the neuron in each place
        self._last = np.zeros(count, np.int64)  # when it was used
        shape = count, 2 * self._hidden
        self._window = torch.zeros(shape, dtype=self._dtype, device=self._device)

    @property
    def read_bytes(self) -> int:
        """Most bytes that a pass reads."""
        return int(self.bundle_bytes * (self.neurons - len(self._held)))

    @property
    def fixed_bytes(self) -> int:
        """Bytes in memory besides the window and biases."""
        return int(self.screen.bytes + self._slots.nbytes + self._sums.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer on x [..., hidden].

        Raises:
            ModelError: neurons cannot be read, or are not those that were written.
        """
        flat = x.reshape(-1, x.shape[-1])
        active = self.screen.candidates(flat)
        total = torch.zeros(flat.shape, dtype=torch.float32, device=x.device)
        for start in range(0, len(active), len(self._held)):
            some = active[start : start + len(self._held)]
            bundles = self._window[torch.from_numpy(self._fetch(some)).to(x.device)]
            rows, columns = bundles[:, : self._hidden], bundles[:, self._hidden :]
            inputs = flat @ rows.T
            if self._up_bias is not None:
                inputs = inputs + self._up_bias[torch.from_numpy(some).to(x.device)]
            total += (self._act(inputs) @ columns).float()
        out = total.to(x.dtype)
        return (out if self._down_bias is None else out + self._down_bias).view(x.shape)

    def _fetch(self, neurons: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of neurons in the window, and read those that it lacks."""
        self._time += 1
        slots = self._slots[neurons]
        self._last[slots[slots >= 0]] = self._time
        missing = neurons[slots < 0]
        self.used += len(neurons)
        self.missed += len(missing)
        if len(missing):
            read = np.empty((len(missing), self.bundle_bytes), np.uint8)
            self._file.read(self._start, missing, read)
            if (_checksums(read) != self._sums[missing]).any():
                raise ModelError(
                    "neurons that were read from their file are not those that were written; check "
                    "the disk that XDG_CACHE_HOME lies on, and open the model again"
                )
            places = np.argsort(self._last, kind="stable")[: len(missing)]
            left = self._held[places]
            self._slots[left[left >= 0]] = -1
            self._slots[missing], self._held[places] = places, missing
            self._last[places] = self._time
            bundles = torch.from_numpy(read).view(self._dtype).to(self._device)
            self._window[torch.from_numpy(places).to(self._device)] = bundles
        return self._slots[neurons]


def share_memory(windows: Sequence[NeuronWindow], budget: int, others: int) -> None:
    """Let windows keep as many neurons as fit into a budget, the same share of each layer.

    Args:
        windows: of all layers.
        budget: bytes for all weights.
        others: bytes of those that are no rows or columns of neurons.

    Raises:
        ModelError: the budget is too small; says the smallest one.
    """
    fixed = sum(each.fixed_bytes for each in windows)
    fewest = [min(FEWEST, each.neurons) for each in windows]
    least = sum(each.bundle_bytes * count for each, count in zip(windows, fewest, strict=True))
    left = budget - others - fixed
    if left < least:
        raise ModelError(
            f"the memory for weights is {budget} bytes, expected at least "
            f"{others + fixed + least}: what is no neuron takes {others}, copies of first matrices "
            f"in 8 bits {fixed}, and {FEWEST} neurons of each layer {least}"
        )
    share = left / sum(each.bundle_bytes * each.neurons for each in windows)
    for each, count in zip(windows, fewest, strict=True):
        each.keep(min(max(int(share * each.neurons), count), each.neurons))
