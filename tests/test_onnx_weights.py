"""The weights of exported ONNX files, found by what their sidecars say, as a GPU runs them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import run_program

from blip2.checkpoints import open_checkpoint
from blip2.errors import Blip2Error
from blip2.vision import onnx_files
from blip2.vision.export import OPSETS
from blip2.vision.onnx_files import OnnxFiles
from blip2.vision.onnx_runtime import OnnxRuntimeSession
from blip2.vision.torch_session import TorchSession

pytestmark = pytest.mark.xdist_group("onnx_weights")  # each file is exported once
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=OPSETS, ids="opset {}".format)
def exported(request, tiny_export, tmp_path_factory):
    if request.param == OPSETS[0]:  # which is the default
        return tiny_export.output
    directory = tmp_path_factory.mktemp("exported")
    done = run_program(
        *("onnx_export.py", "--model_dir", tiny_export.checkpoint, "--opset", request.param),
        *("--image", tiny_export.picture, "--dtype", "float32", "--output_dir", directory),
    )
    assert done.returncode == 0, done.stderr
    return directory


def open_files(directory) -> OnnxFiles:
    return OnnxFiles.open(directory / "onnx", directory / "query_tokens.pt")


def test_they_are_the_checkpoints(exported, tiny_checkpoint):
    found, checkpoint = (
        open_files(exported).checkpoint(),
        open_checkpoint(tiny_checkpoint.checkpoint),
    )
    state = tiny_checkpoint.model.state_dict()
    vit = [name for name in found.names if name.startswith("vision_model.")]
    assert len(vit) > 20
    for name in found.names:
        tensor = found.tensor(name)
        assert torch.equal(tensor, checkpoint.tensor(name)), name
        assert torch.equal(tensor, state[name]), name


def test_their_stages_are_transformers_and_onnx_runtimes(exported, tiny_checkpoint):
    files = open_files(exported)
    ours = TorchSession(files.checkpoint(), files.preprocessing, torch.float32, CPU)
    theirs = OnnxRuntimeSession(files)
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.inference_mode():
        features = tiny_checkpoint.model.get_image_features(pixel_values)
    for session in (ours, theirs):
        image_embeds = session.vit(pixel_values)
        query_output = session.qformer(image_embeds)
        torch.testing.assert_close(image_embeds, features.last_hidden_state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(query_output, features.pooler_output, rtol=1e-4, atol=1e-4)
    assert ours.output_size == theirs.output_size
    assert ours.num_query_tokens == theirs.num_query_tokens


@pytest.mark.parametrize(
    "compute_dtype, device, session",
    [
        ("float32", "cuda", TorchSession),
        ("int8", "cuda", OnnxRuntimeSession),
        ("float32", "cpu", OnnxRuntimeSession),
    ],
)
def test_the_machine_chooses_the_engine(
    compute_dtype, device, session, tiny_export, tmp_path, monkeypatch
):
    directory = shutil.copytree(tiny_export.output, tmp_path / "out")
    sidecar = directory / "onnx" / "visual_encoder" / "visual_encoder.json"
    facts = json.loads(sidecar.read_text()) | {"compute_dtype": compute_dtype}
    sidecar.write_text(json.dumps(facts))
    monkeypatch.setattr(onnx_files, "best_device", lambda: torch.device(device))
    opened = onnx_files.open_onnx_session(directory / "onnx", directory / "query_tokens.pt")
    assert type(opened) is session
    assert opened.device.type == (device if session is TorchSession else "cpu")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda facts: facts.pop("weights"), r"does not describe .* \(KeyError: 'weights'\)"),
        (lambda facts: facts.pop("vision_config"), "KeyError: 'vision_config'"),
        (lambda facts: first(facts).update(offset=8), "no weight lies at bytes"),
        (lambda facts: first(facts).update(offset=1 << 40), "no weight lies at bytes"),
        (lambda facts: first(facts).update(offset=-4), "no weight lies at bytes"),
        (lambda facts: first(facts).update(dtype="int4"), "KeyError: 'int4'"),
        (lambda facts: first(facts).update(file="../../image.pt"), "KeyError"),
    ],
)
def test_sidecars_that_cannot_be_are_refused(edit, message, tiny_export, tmp_path):
    directory = shutil.copytree(tiny_export.output, tmp_path / "out")
    sidecar = directory / "onnx" / "visual_encoder" / "visual_encoder.json"
    facts = json.loads(sidecar.read_text())
    edit(facts)
    sidecar.write_text(json.dumps(facts))
    with pytest.raises(Blip2Error, match=message):
        open_files(directory).checkpoint()


def first(facts: dict) -> dict:
    """Where the largest weight lies, which others surround."""
    return max(facts["weights"].values(), key=lambda weight: torch.Size(weight["shape"]).numel())
