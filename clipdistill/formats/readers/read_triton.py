"""Embed probes with ONNX Runtime as a Triton model repository's configurations state, and as nothing else.

The configurations are parsed by the schema that ``tritonclient`` has of the server. The server itself is not run.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

_TYPES = {"TYPE_FP32": ("tensor(float)", np.float32), "TYPE_INT64": ("tensor(int64)", np.int64)}
_ALONE = 3


def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Embed all probes in batches as large as allowed, and the first ones alone."""
    given, found = np.load(probes, allow_pickle=False), {}
    for place in sorted((Path(folder) / "triton").iterdir()):
        # an unknown field or a value of another type is refused
        config = text_format.Parse((place / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())
        session = onnxruntime.InferenceSession(str(place / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
        _check(place.name, config, session)
        inputs = {one.name: given[one.name].astype(_kind(one)[1]) for one in config.input}
        found[place.name] = _embed(config, session, inputs, config.max_batch_size)
        first = {name: value[:_ALONE] for name, value in inputs.items()}
        found[f"{place.name}_alone"] = _embed(config, session, first, 1)
    np.savez(out, **found)
    sys.stdout.write(f"{importlib.metadata.version('tritonclient')}, onnxruntime {onnxruntime.__version__}")


def _check(folder: str, config: Any, session: Any) -> None:
    """What Triton refuses to load: other names, types or dimensions than the graph's, or a batch that is none."""
    if (config.name, config.backend) != (folder, "onnxruntime") or config.max_batch_size < 1:
        raise ValueError(f"{folder}: not a batched ONNX Runtime model of that name: {config.name} by {config.backend}")
    for stated, borders in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        wanted = {one.name: (_kind(one)[0], [-1, *one.dims]) for one in stated}
        has = {one.name: (one.type, [dim if isinstance(dim, int) else -1 for dim in one.shape]) for one in borders}
        if wanted != has:
            raise ValueError(f"{folder}: config.pbtxt states {wanted}, the graph has {has}")


def _kind(border: Any) -> Any:
    return _TYPES[model_config_pb2.DataType.Name(border.data_type)]


def _embed(config: Any, session: Any, inputs: dict[str, Any], most: int) -> Any:
    rows, (output,) = len(next(iter(inputs.values()))), config.output
    parts = [{name: value[at : at + most] for name, value in inputs.items()} for at in range(0, rows, most)]
    return np.concatenate([session.run([output.name], part)[0] for part in parts])


if __name__ == "__main__":
    main(*sys.argv[1:5])
