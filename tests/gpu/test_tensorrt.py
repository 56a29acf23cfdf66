"""The session on TensorRT plans with a GPU's buffers, streams and graphs; the double computes on it.

The plans are empty: what they describe themselves as is all that the double needs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import models
import pytest
import torch

# The same tests, with the fixtures below.
from test_tensorrt_session import (  # noqa: F401
    Setup,
    session,
    test_batches_of_all_sizes_in_turn,
    test_buffers_are_allocated_once,
    test_kernels_of_another_driver_are_no_reason_for_what_fails_later,
    test_kernels_that_rtx_compiled_are_kept_for_the_next_process,
    test_one_context_and_graph_a_batch_size_and_no_copy_between_the_stages,
    test_plan_that_cannot_be_captured_still_runs,
    test_plans_of_different_profiles,
    test_qformer_takes_embeddings_from_anywhere,
    test_refusal_while_running_gives_tensorrts_reason,
    test_session_describes_itself,
    test_session_equals_the_modules,
    test_session_on_standard_tensorrt,
)

from blip2 import artifacts
from blip2.checkpoints import open_checkpoint
from blip2.images import Preprocessing
from blip2.vision.tensorrt_plans import QFORMER, VIT
from blip2.vision.tensorrt_session import Gpu


@dataclasses.dataclass(frozen=True)
class EmptyPlans:
    checkpoint: Path
    output: Path

    @property
    def plan(self) -> Path:
        return self.output / "plan"


@pytest.fixture(scope="module")
def empty_plans(tmp_path_factory) -> EmptyPlans:
    """A tiny BLIP-2, and plans of it for this GPU."""
    output = tmp_path_factory.mktemp("plans")
    models.tiny_blip2(
        output / "checkpoint",
        vision={"num_hidden_layers": 1},
        qformer={"num_hidden_layers": 2},
    )
    checkpoint = open_checkpoint(output / "checkpoint")
    source = {"source": {"fingerprint": "tiny"}}
    image_embeds, queries = ("float16", (5, 48)), ("float16", (4, 32))
    tensors = {
        VIT: ({"input": ("float16", (3, 28, 28))}, {"output": image_embeds}),
        QFORMER: (
            {"query_tokens": queries, "image_embeds": image_embeds, "image_atts": ("int64", (5,))},
            {"query_output": ("float16", (4, 64))},
        ),
    }
    for stage, sides in tensors.items():
        plan = output / "plan" / stage.plan_file
        plan.parent.mkdir(parents=True)
        plan.write_text(stage.label)
        inputs, outputs = (
            {
                name: {"dtype": dtype, "shape": ["batch", *shape]}
                for name, (dtype, shape) in side.items()
            }
            for side in sides
        )
        artifacts.write_sidecar(
            plan,
            tensorrt={"flavour": "tensorrt_rtx", "version": "1.7.1.116"},
            gpu={"compute_capabilities": [Gpu().compute_capability]},
            profile={"min": 1, "opt": 4, "max": 8},
            inputs=inputs,
            outputs=outputs,
            preprocessing=dataclasses.asdict(Preprocessing.of(checkpoint)),
            **source,
        )
    query_tokens = output / "query_tokens.pt"
    artifacts.save_tensor(checkpoint.tensor("query_tokens").float(), query_tokens)
    artifacts.write_sidecar(query_tokens, **source)
    return EmptyPlans(output / "checkpoint", output)


@pytest.fixture
def setup(empty_plans, tmp_path):
    # In TF32 the convolution of patches would depend on the batch's size.
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield Setup(empty_plans, tmp_path, Gpu())


def test_it_records_on_the_stream_that_it_names():
    """RTX is asked about that one: the default stream can never be captured."""
    gpu, seen = Gpu(), []
    number = torch.zeros(1, device=gpu.device).add_(1)

    def work() -> None:
        seen.append(gpu.stream())
        number.add_(1)

    replay = gpu.capture(work)
    assert seen == [gpu.recording_stream]
    assert gpu.recording_stream != torch.cuda.default_stream().cuda_stream
    assert number.item() == 1
    replay()
    assert number.item() == 2


def test_work_of_other_streams_is_none_of_its_own(session, setup):  # noqa: F811
    """It runs on the stream that is current, in order with what is queued there before and after."""
    pictures = torch.randn(8, 3, 28, 28, device=setup.gpu.device)
    expected = setup.expected(pictures)[0]
    session.vit(pictures)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(pictures)
        torch.cuda._sleep(50_000_000)
        late.copy_(pictures)
        found = session.vit(late).clone()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
