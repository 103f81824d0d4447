"""The files of a run directory, by name. Those of its artifacts and checkpoints: ``store``."""

SPEC = "spec.yaml"  # as resolved, secrets removed
RECORD = "record.jsonl"
RESULT = "result.json"
TEACHER = "teacher/model.onnx"
REQUEST = "teacher/request.npz"  # what latency is measured with
PROFILE = "profile.jsonl"  # the device profile that the search made
SENSITIVITY = "sensitivity.json"
EXPLANATION = "explain.json"
PAGE = "report.html"
