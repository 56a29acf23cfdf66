"""serve.py --ray: replicas on this machine's processors, with the API of one server."""

from __future__ import annotations

import socket

import pytest
from batch_runs import wait_for
from serving_runs import CAPTION, at_once, start

pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")
pytest.importorskip("ray.serve", reason="pip install -r requirements-ray.txt")
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_two_replicas_are_one_server(tmp_path, free_port):
    autoscaling = '{"min_replicas": 2, "max_replicas": 2}'
    flags = {"--port": str(free_port), "--ray": "local", "--ray_autoscaling": autoscaling}
    server = start(tmp_path / "s", script="serve.py", **flags)
    try:
        assert wait_for(lambda: "is ready" in server.said() or server.process.poll(), 120)
        assert "is ready" in server.said(), server.said()
        assert server.get("/ready").status == 200
        answers = at_once(*[lambda: server.ask("")] * 8)
        assert [answer.text for answer in answers] == [CAPTION] * 8
        server.check_answers()
        streamed = server.ask("What colour is the triangle?", stream=True)
        assert b'"content":"orange"' in streamed.body
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        # Each counts what it has answered: the proxies have sent requests to both.
        counted = [server.metrics().get('blip2_requests_total{outcome="ok"}', 0) for _ in range(12)]
        assert 0 < max(counted) < 10
        assert server.get("/metrics", Authorization="").status == 401
        refused = server.ask("", b"no picture")
        assert (refused.status, refused.error["code"]) == (400, "picture_unknown")
        assert server.ask("", n=17).status == 400
        assert server.stop(seconds=40) == 0
        assert wait_for(lambda: not server.processes(), 20)
        assert "Traceback" not in server.said()
    finally:
        server.process.kill()


@pytest.mark.slow
def test_engines_that_cannot_be_opened_are_said_in_a_line(tmp_path, free_port):
    flags = {"--port": str(free_port), "--ray": "local", "--engine_dir": "nowhere"}
    flags["--ray_replicas"] = "1"
    server = start(tmp_path / "s", script="serve.py", **flags)
    try:
        assert server.process.wait(120) == 2
        assert server.said().splitlines()[-1].startswith("error: nowhere holds no ViT")
        assert "Traceback" not in server.said()
    finally:
        server.process.kill()
