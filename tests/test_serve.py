"""serve.py from the outside: OpenAI's API as its own clients use it, and an orderly life."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from bad_inputs import encoded
from batch_runs import scene, wait_for
from conftest import ROOT, run_program
from pages import commands, fenced, shows
from serving_runs import (
    CAPTION,
    KEY,
    SCENE,
    Server,
    at_once,
    data_url,
    events,
    question,
    start,
)

from demo import scenes

openai = pytest.importorskip("openai", reason="pip install -r requirements-test.txt")
pytestmark = pytest.mark.xdist_group("serve")  # one server for all

# What jq, which is not everywhere, does in the page's command.
PICK_CONTENT = (
    'python -c \'import json; print(json.load(open(0))["choices"][0]["message"]["content"])\''
)


def messages(text: str, picture: bytes = SCENE) -> list:
    return question(text, picture)["messages"]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def test_openais_client_gets_a_caption_and_an_answer(client):
    assert [model.id for model in client.models.list()] == ["blip2"]
    assert client.models.retrieve("blip2").id == "blip2"
    caption = client.chat.completions.create(model="blip2", messages=messages(""))
    assert caption.choices[0].message.content == CAPTION
    assert caption.choices[0].finish_reason == "stop"
    # 16 query tokens and BOS; what demo/checkpoint's tokenizer makes of the caption.
    words = CAPTION.replace(",", " ,").split()
    assert (caption.usage.prompt_tokens, caption.usage.completion_tokens) == (17, len(words))
    assert caption.usage.total_tokens == 17 + len(words)
    answer = client.chat.completions.create(
        model="blip2", messages=messages("What colour is the circle?"), max_tokens=1000
    )
    assert answer.choices[0].message.content == "red"
    cut = client.chat.completions.create(
        model="blip2", messages=messages(""), max_completion_tokens=4
    )
    assert cut.choices[0].message.content == "a small red circle"
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 4


def test_openais_client_streams(client):
    stream = client.chat.completions.create(
        model="blip2",
        messages=messages(""),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == CAPTION
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(CAPTION.replace(",", " ,").split())
    assert len({chunk.id for chunk in chunks}) == 1


def test_openais_async_client_asks_many_at_once(server):
    questions = ["", "What colour is the circle?", "What colour is the triangle?"] * 4

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
        ) as client:

            async def one(text: str) -> str:
                stream = await client.chat.completions.create(
                    model="blip2", messages=messages(text), stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, questions))

    assert asyncio.run(ask()) == [CAPTION, "red", "orange"] * 4


def test_pictures_that_come_at_once_are_not_taken_for_one_another(server):
    """Their pixels lie side by side in memory that decoders and engines share."""
    drawn_scenes = [scene(100 + number) for number in range(12)]

    def ask(number: int) -> str:
        answer = server.ask("", encoded(drawn_scenes[number].image, "PNG"))
        return answer.json["choices"][0]["message"]["content"]

    found = at_once(*(functools.partial(ask, number) for number in range(len(drawn_scenes))))
    assert found == [scenes.caption(drawn) for drawn in drawn_scenes]


def test_openais_client_raises_its_errors(server, client):
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model="blip2", messages=messages("x", b"no picture"))
    assert caught.value.code == "picture_unknown"
    assert caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError) as caught:
        ask(model="gpt-5", messages=messages(""))
    assert caught.value.code == "model_not_found"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_curl_asks_and_streams(server, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    body = tmp_path / "body.json"

    def curl(**more) -> str:
        body.write_text(json.dumps(question("What colour is the circle?", **more)))
        return subprocess.run(
            [
                *("curl", "-sS", "-N", f"{server.url}/v1/chat/completions"),
                *("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"),
                *("-d", f"@{body}"),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert json.loads(curl())["choices"][0]["message"]["content"] == "red"
    streamed = events(curl(stream=True).encode())
    assert streamed[-1] is None
    assert [e["choices"][0]["delta"].get("content") for e in streamed[:-1]] == ["", "red", None]


def test_beams_choices_and_draws(server):
    found = server.ask("What colour is the circle?", num_beams=3, n=2).json
    beams = found["blip2"]["answers"]
    assert [c["message"]["content"] for c in found["choices"]] == [b["text"] for b in beams[:2]]
    assert beams[0]["text"] == "red"
    assert [b["score"] for b in beams] == sorted((b["score"] for b in beams), reverse=True)
    streamed = events(server.ask("What colour is the circle?", num_beams=3, n=2, stream=True).body)
    texts = ["", ""]
    for choice in (e["choices"][0] for e in streamed[:-1]):
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [b["text"] for b in beams[:2]]
    drawn = [server.ask("", temperature=3, seed=5, n=2, max_tokens=6).json for _ in range(2)]
    one, other = ([c["message"]["content"] for c in found["choices"]] for found in drawn)
    assert one == other  # the same draws
    assert one[0] != one[1]  # of each choice its own
    assert server.ask("", temperature=0, top_p=0.5).text == CAPTION
    assert server.ask("", top_p=1).text == CAPTION


def test_answers_are_run_pys(server, tmp_path):
    """Beam search and a penalty, of another picture."""
    picture = tmp_path / "scene.png"
    scene(3).image.save(picture)
    done = run_program(
        *("run.py", "--engine_dir", "demo/checkpoint", "--opt_engine_dir", "demo/checkpoint"),
        *("--input_dir", picture, "--input_text", "", "--num_beams", "3", "--json"),
        *("--length_penalty", "2", "--repetition_penalty", "1.2", "--max_output_len", "12"),
    )
    [expected] = json.loads(done.stdout)["answers"]
    options = {"num_beams": 3, "length_penalty": 2, "repetition_penalty": 1.2, "max_tokens": 12}
    found = server.ask("", picture.read_bytes(), **options).json["blip2"]["answers"]
    for one, other in zip(found, expected, strict=True):
        assert (one["text"], one["flags"]) == (other["text"], other["flags"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(server, stream):
    """Which takes several tokens, one of them begun in vain before."""
    stop = [", a large", "never"]
    answer = server.ask("", stop=stop, stream=stream)
    expected = CAPTION.partition(", a large")[0]
    if stream:
        found = [e["choices"][0] for e in events(answer.body)[:-1]]
        assert "".join(c["delta"].get("content") or "" for c in found) == expected
        assert found[-1]["finish_reason"] == "stop"
    else:
        assert answer.text == expected
        assert answer.json["choices"][0]["finish_reason"] == "stop"
    beams = server.ask("", stop=stop, num_beams=2).json
    assert beams["choices"][0]["message"]["content"] == expected


def test_a_conversation_is_put_before_the_question(server):
    ask = question("What colour is the circle?")
    ask["messages"] += [
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And the triangle?"},
    ]
    answer = server.post(ask)
    assert answer.json["blip2"]["prompt"] == (
        "Question: What colour is the circle? Answer: red. Question: And the triangle? Answer:"
    )
    # With many turns the oldest do not fit: whole ones are left out.
    turns = ask["messages"][1:]
    turns[1]["content"] = "What colour is the circle?"
    ask["messages"] += turns * 20
    prompt = server.post(ask).json["blip2"]["prompt"]
    assert re.fullmatch(
        r"(Question: What colour is the circle\? Answer: red\. )+"
        r"Question: What colour is the circle\? Answer:",
        prompt,
    )
    long = server.ask("what " * 200)
    assert (long.status, long.error["code"]) == (400, "context_length_exceeded")


def test_the_same_picture_is_looked_at_once(server):
    picture = data_url(SCENE + b"behind it")  # another file, the same pixels
    first = server.ask("", picture).json["blip2"]
    second = server.ask("What colour is the circle?", picture).json["blip2"]
    assert (first["picture"]["known"], second["picture"]["known"]) == (False, True)
    assert "ViT" in first["seconds"]
    assert "ViT" not in second["seconds"]
    before = server.metrics()['blip2_pictures_total{outcome="looked_at"}']
    new = data_url(SCENE + b"asked by many")
    answers = at_once(*[lambda: server.ask("What colour is the circle?", new)] * 6)
    assert [answer.text for answer in answers] == ["red"] * 6
    assert server.metrics()['blip2_pictures_total{outcome="looked_at"}'] == before + 1


def test_every_path_but_the_page_and_health_wants_the_key(server):
    from blip2.serving.app import Service, ServiceSettings

    routes = {route.path for route in Service(ServiceSettings()).app._app.routes}
    assert {"/", "/health", "/metrics", "/v1/chat/completions"} <= routes
    odd = {"/docs", "/openapi.json", "//", "/health/", "/health/x", "/v1/models/../../health"}
    odd |= {"/%2e", "/metrics/", "//metrics", "/HEALTH"}
    for path in (routes | odd) - {"/", "/health"}:
        for key in ("", "Bearer", "Bearer other", f"Basic {KEY}", KEY, f"Bearer {KEY}x"):
            answer = server.get(path, Authorization=key)
            assert answer.status == 401, (path, key)
            assert answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health"):
        assert server.get(path, Authorization="").status == 200
    assert server.post(question(), Authorization="").status == 401
    assert server.get("/nowhere").status == 404
    assert server.get("/nowhere").error["type"] == "invalid_request_error"
    assert server.get("/v1/chat/completions").status == 405
    assert server.request("OPTIONS", "/v1/chat/completions").status == 405


def test_each_request_has_an_id_and_a_line_in_the_log(server):
    answer = server.ask("What colour is the circle?")
    mine = server.request("GET", "/ready", **{"X-Request-Id": "my.id-1"})
    assert mine.headers["x-request-id"] == "my.id-1"
    forged = server.request("GET", "/ready", **{"X-Request-Id": 'a" forged'})
    assert forged.headers["x-request-id"] != 'a" forged'
    wait_for(lambda: len(server.log()) and server.log()[-1]["id"] != "my.id-1", 2)
    lines = {line["id"]: line for line in server.log()}
    line = lines[answer.headers["x-request-id"]]
    assert line["method"] == "POST"
    assert (line["path"], line["status"]) == ("/v1/chat/completions", 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (27, 1)
    assert lines["my.id-1"]["status"] == 200
    assert not any(KEY in json.dumps(line) for line in lines.values())


def test_metrics_count(server):
    before = server.metrics()
    server.ask("", b"no picture")
    server.ask("What colour is the circle?")
    server.ask("", max_tokens=5)
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('blip2_requests_total{outcome="ok"}') == 2
    assert grown('blip2_requests_total{outcome="bad_request"}') == 1
    assert grown("blip2_completion_tokens_total") == 6
    assert grown("blip2_prompt_tokens_total") == 27 + 17
    assert grown("blip2_first_token_seconds_count") == 2
    assert grown("blip2_token_seconds_count") == 1
    assert grown('blip2_pictures_total{outcome="refused"}') == 1
    assert after["blip2_rows"] == 16
    documented = (ROOT / "docs" / "serving.md").read_text()
    names = {re.match(r"\w+?(?=_total|_bucket|_count|_sum|\{| |$)", name)[0] for name in after}
    assert names
    assert all(f"`{name}" in documented for name in names), names


def used(server: Server) -> float:
    return server.metrics()["blip2_rows_used"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(server, stream):
    """Half way through an answer; others go on."""
    with server.slowly(0.15):
        connection = server.connect()
        body = json.dumps(question("", stream=stream, num_beams=1, n=4))
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        assert wait_for(lambda: used(server) == 4, 5)
        other = []
        asking = threading.Thread(target=lambda: other.append(server.ask("")))
        asking.start()
        assert wait_for(lambda: used(server) == 5, 5)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert wait_for(lambda: used(server) == 1, 1.8)  # an answer takes 3.45 s
        asking.join()
    assert other[0].text == CAPTION
    left = [line for line in server.log() if line["status"] == 499]
    assert left[-1]["path"] == "/v1/chat/completions"


def test_a_stream_that_is_closed_ends_its_request(server, client):
    with server.slowly(0.15):
        stream = client.chat.completions.create(model="blip2", messages=messages(""), stream=True)
        next(iter(stream))
        assert used(server) == 1
        stream.close()
        assert wait_for(lambda: used(server) == 0, 1.8)


def test_more_than_may_wait_get_429(server):
    """16 rows, and 8 that may wait."""
    with server.slowly():
        answers = at_once(*[lambda: server.ask("", n=4)] * 8)
    refused = [answer for answer in answers if answer.status == 429]
    assert len(refused) == 2
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.error["type"] == "rate_limit_error"
    assert all(answer.text == CAPTION for answer in answers if answer.status == 200)
    server.check_answers()


def test_an_answer_that_takes_too_long_is_ended(tmp_path):
    slow = start(tmp_path / "s", **{"--request_timeout": "0.5"})
    try:
        slow.wait_ready()
        with slow.slowly():
            answer = slow.ask("")
            assert (answer.status, answer.error["code"]) == (504, "request_timeout")
            assert wait_for(lambda: used(slow) == 0, 0.6)
            streamed = events(slow.ask("", stream=True).body)
        assert streamed[-1]["error"]["code"] == "request_timeout"
        assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
        slow.check_answers()
        # And in the same life, how it ends: what waits for no one is at once.
        assert slow.stop() == 0
    finally:
        slow.process.kill()


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(tmp_path):
    server = start(tmp_path / "s")
    try:
        # While the engines load it is alive, and not ready.
        assert server.get("/health").status == 200
        assert server.get("/ready").status == 503
        assert server.metrics()["blip2_rows"] == 0
        early = server.ask("")
        assert (early.status, early.error["code"]) == (503, "loading")
        assert early.headers["retry-after"]
        server.wait_ready()
        with server.slowly():
            running = []
            asking = threading.Thread(target=lambda: running.append(server.ask("", stream=True)))
            asking.start()
            assert wait_for(lambda: used(server) == 1, 5)
            server.process.send_signal(signal.SIGTERM)
            assert wait_for(lambda: server.get("/ready").status == 503, 0.8)
            late = server.ask("")
            assert (late.status, late.error["code"]) == (503, "stopping")
            assert server.get("/health").status == 200
            asking.join()
        assert server.process.wait(5) == 0
        texts = [
            e["choices"][0]["delta"].get("content") or "" for e in events(running[0].body)[:-1]
        ]
        assert "".join(texts) == CAPTION
        assert wait_for(lambda: not server.processes(), 5)
    finally:
        server.process.kill()


def test_sigterm_waits_no_longer_than_it_may(tmp_path):
    server = start(tmp_path / "s", **{"--shutdown_timeout": "0.3"})
    try:
        server.wait_ready()
        with server.slowly():
            running = []
            asking = threading.Thread(target=lambda: running.append(server.ask("")))
            asking.start()
            assert wait_for(lambda: used(server) == 1, 5)
            assert server.stop(seconds=3) == 0
            asking.join()
        assert (running[0].status, running[0].error["code"]) == (503, "stopping")
    finally:
        server.process.kill()


def test_a_second_signal_ends_it_at_once(tmp_path):
    server = start(tmp_path / "s")
    try:
        server.wait_ready()
        with server.slowly():
            asking = threading.Thread(target=_ask_in_vain, args=(server,))
            asking.start()
            assert wait_for(lambda: used(server) == 1, 5)
            server.process.send_signal(signal.SIGINT)
            assert wait_for(lambda: server.get("/ready").status == 503, 0.8)
            assert server.stop(signal.SIGINT, seconds=1.0) == 1
            asking.join()
        assert wait_for(lambda: not server.processes(), 5)
        assert "Traceback" not in server.said()
    finally:
        server.process.kill()


def _ask_in_vain(server: Server) -> None:
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        server.ask("")


def test_engines_that_die_end_the_server(tmp_path):
    server = start(tmp_path / "s")
    try:
        server.wait_ready()
        [engines] = (
            set(server.processes())
            - {server.process.pid}
            - set(server.decoders())
            - _trackers(server)
        )
        os.kill(engines, signal.SIGKILL)
        assert server.process.wait(10) == 2
        assert (
            server.said()
            .splitlines()[-1]
            .startswith("error: the process with the engines has ended")
        )
    finally:
        server.process.kill()


def _trackers(server: Server) -> set[int]:
    return {
        pid
        for pid in server.processes()
        if b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--engine_dir", "nowhere"], "error: nowhere holds no ViT"),
        (["--api_key", "two words"], "error: a key is empty, or has blanks"),
        (["--host", "no.such.host.invalid"], "error: cannot listen on no.such.host.invalid:"),
        (["--max_output_len", "500"], "error: this OPT takes 128 tokens: 16 for the picture"),
        (["--max_body_mb", "0"], "is not a number above 0"),
        (["--ray_replicas", "2"], "--ray_replicas goes with --ray"),
        (["--ray", "--ray_autoscaling", "[]"], "'[]' is not a JSON object"),
        (["--ray", "--ray_autoscaling", "{}", "--ray_replicas", "2"], "goes without --ray_auto"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, says):
    done = run_program(
        *("serve.py", "--port", "0", "--engine_dir", "demo/checkpoint"),
        *("--opt_engine_dir", "demo/checkpoint", *arguments),
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert says in last
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(server):
    done = run_program("serve.py", "--port", str(server.port))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{server.port}")


def with_server(text: str, server: Server) -> str:
    return text.replace("http://127.0.0.1:8000", server.url).replace('"none"', repr(KEY))


def test_what_its_page_shows(server, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [code] = [content for kind, content in fenced("docs/serving.md") if kind == "python"]
    exec(with_server(code, server), {})
    assert capsys.readouterr().out == "red\nred"
    asked = [c for c in commands("docs/serving.md") if "http://127.0.0.1:8000" in c.text]
    assert len(asked) == 2
    for command in asked:
        text = with_server(command.text, server)
        text = text.replace(" -d @-", f' -H "Authorization: Bearer {KEY}" -d @-')
        text = text.replace("jq -r .choices[0].message.content", PICK_CONTENT)
        done = subprocess.run(
            ["bash", "-c", text.replace("python", sys.executable)],
            capture_output=True,
            text=True,
            env={**os.environ, "BLIP2_API_KEY": KEY},
        )
        assert shows(command, done.stdout), (text, done)
    flags = re.findall(r"`(--\w+)`", (ROOT / "docs" / "serving.md").read_text())
    known = run_program("serve.py", "--help").stdout + run_program("run.py", "--help").stdout
    assert flags
    assert not [flag for flag in flags if flag not in known]
