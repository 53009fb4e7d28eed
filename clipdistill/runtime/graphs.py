"""One ONNX graph on the CPU, checked at its borders: what goes in, what comes out, and how wide."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import DataError, MismatchError, MissingExtraError
from clipdistill.runtime.folder import REMEDY
from clipdistill.towers.encoder import Vectors

_NUMBERS = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
_ERRORS_ALONE = 3
_EXTERNAL, _NOWHERE = "session.model_external_initializers_file_folder_path", f"{os.devnull}/nowhere"


@final
class Graph:
    """An ONNX graph that turns batches into unit rows.

    Args:
        name: Its file, for messages.
        model: The file's bytes, which are proved by now.
        inputs: ONNX's types of its inputs by their names.
        output: The name of its output, float32 [batch, dim].
        sizes: What the dimensions of a border must be where the graph fixes them, by name; None leaves one open.
        threads: How many threads one run uses; 0 = one for each core.

    Raises:
        MissingExtraError: If ONNX Runtime is not installed.
        DataError: If ONNX Runtime cannot load the graph.
        MismatchError: If its borders are others than these.
    """

    def __init__(
        self,
        name: str,
        model: bytes,
        *,
        inputs: Mapping[str, str],
        output: str,
        sizes: Mapping[str, Sequence[int | None]],
        threads: int,
    ) -> None:
        self._name, self._output = name, output
        self._session = _session(name, model, threads)
        found = {value.name: value.type for value in self._session.get_inputs()}
        self._check("inputs", dict(inputs), found)
        outputs = {value.name: value.type for value in self._session.get_outputs()}
        self._check("output", {output: "tensor(float)"}, {output: outputs.get(output, "none")})
        for value in (*self._session.get_inputs(), *self._session.get_outputs()):
            if value.name in sizes and not _agree(sizes[value.name], value.shape):
                self._check(f"shape of {value.name}", list(sizes[value.name]), value.shape)
        self._inputs = {key: _NUMBERS[kind] for key, kind in inputs.items()}

    def run(self, **values: npt.NDArray[Any]) -> Vectors:
        """Embed one batch.

        Args:
            values: The inputs by their names, [batch, ...].

        Returns:
            float32 [batch, dim].
        """
        fed = {key: np.ascontiguousarray(values[key], kind) for key, kind in self._inputs.items()}
        return np.asarray(self._session.run([self._output], fed)[0], np.float32)

    def _check(self, field: str, expected: object, found: object) -> None:
        if expected != found:
            raise MismatchError(self._name, field, expected, found, REMEDY)


def _agree(expected: Sequence[int | None], found: Sequence[Any]) -> bool:
    """Whether two shapes can be the same; a name or None stands for a dimension that is open."""
    return len(expected) == len(found) and all(
        left == right for left, right in zip(expected, found, strict=True) if left is not None and type(right) is int
    )


def _session(name: str, model: bytes, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as missing:
        raise MissingExtraError("onnxruntime", "serve") from missing
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS_ALONE
    # A graph may keep its weights in a file that it names, which for a graph from memory starts at the working folder,
    # and climbs: it would give the bytes of any file that this process may read. From here there is none to be found.
    options.add_session_config_entry(_EXTERNAL, _NOWHERE)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as fault:  # ONNX Runtime's exceptions have no common class but this
        raise DataError(f"{name}: ONNX Runtime {onnxruntime.__version__} cannot load it: {fault}. {REMEDY}") from fault
