"""An artifact as an MLflow model: signature, input example, providers, tags."""

from typing import Any

import mlflow
import numpy as np
import onnx
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, RunInfo
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from .choose import Artifact
from .folder import describe, providers

TASK, DIGEST, SHA256 = "flyweight.task", "flyweight.digest", "flyweight.sha256"


def log_model(client: MlflowClient, run: RunInfo, artifact: Artifact) -> str:
    """Stores the model as an output of ``run``: one file, the bytes that were verified; its id.

    MLflow's global address must be that of ``client``. The run is not started for it, as MLflow's
    own way would: a search that was interrupted would then read as finished.
    """
    model = client.create_logged_model(
        run.experiment_id, name="model", source_run_id=run.run_id, tags=tags(artifact)
    )
    io = describe(artifact.model)

    def schema(values: list[dict[str, Any]]) -> Schema:
        return Schema([
            TensorSpec(np.dtype(v["dtype"]), tuple(s or -1 for s in v["shape"]), v["name"])
            for v in values
        ])  # fmt: skip

    example = {
        v["name"]: np.zeros([1 if s is None else s for s in v["shape"]], v["dtype"])
        for v in io["inputs"]
    }
    mlflow.onnx.log_model(
        onnx.load_model_from_string(artifact.model),
        model_id=model.model_id,
        signature=ModelSignature(schema(io["inputs"]), schema(io["outputs"])),
        input_example=example,
        # Inferring them would load the model in a further process that imports all of MLflow.
        pip_requirements=[f"onnx=={onnx.__version__}", "onnxruntime"],
        # MLflow loads ONNX files by ONNX Runtime alone, also those made for OpenVINO.
        onnx_execution_providers=providers(artifact.target["runtime"]),
        onnx_session_options={
            "intra_op_num_threads": artifact.target["threads"],
            "inter_op_num_threads": 1,
        },
        save_as_external_data=False,  # one file, with the digest that was verified
        metadata=tags(artifact),
    )
    client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def tags(artifact: Artifact) -> dict[str, str]:
    """What a version says of itself."""
    return {
        TASK: artifact.task,
        DIGEST: artifact.digest,
        SHA256: artifact.metrics["sha256"],
        "flyweight.metric": f"{artifact.metrics['metric']:.4f}",
        "flyweight.latency_ms": "" if artifact.latency_ms is None else f"{artifact.latency_ms:.6g}",
        "flyweight.fingerprint": str(artifact.target.get("fingerprint", "")),
    }
