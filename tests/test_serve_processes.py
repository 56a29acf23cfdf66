"""serve.py with several processes that speak HTTP: from outside it is one server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from batch_runs import wait_for
from serving_runs import CAPTION, KEY, SCENE, Server, at_once, data_url, events, question, start

pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")
pytestmark = pytest.mark.xdist_group("serve_processes")

PROCESSES = 3


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    server = start(tmp_path_factory.mktemp("several") / "s", **FLAGS)
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.kill()


FLAGS = {"--http_processes": str(PROCESSES)}


def others(server: Server) -> list[int]:
    """Its processes that speak HTTP, but for the first."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in server.processes()}
    return [pid for pid, name in names.items() if name == "blip2-http"]


def send(connection: http.client.HTTPConnection, body: dict) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)


def test_each_answers_and_all_are_counted(several):
    """Which process gets a connection is chance; of so many all get one."""
    before = several.metrics()
    picture = data_url(SCENE + b"asked of all of them")
    ask = [lambda: several.ask("What colour is the circle?", picture)] * 6
    answers = [answer for _ in range(6) for answer in at_once(*ask)]
    assert [answer.text for answer in answers] == ["red"] * 36
    new = [answer.json["blip2"]["picture"]["known"] for answer in answers].count(False)
    assert 1 <= new <= PROCESSES  # each looks at a picture once, at most
    # Whoever is asked knows of all.
    for _ in range(8):
        after = several.metrics()
        assert after['blip2_requests_total{outcome="ok"}'] - before.get(
            'blip2_requests_total{outcome="ok"}', 0
        ) == len(answers)
        counted = after['blip2_pictures_total{outcome="looked_at"}']
        assert counted - before.get('blip2_pictures_total{outcome="looked_at"}', 0) == new
        assert after["blip2_request_seconds_count"] == after['blip2_requests_total{outcome="ok"}']
        assert after["blip2_rows"] == 16
        assert (after["blip2_rows_used"], after["blip2_requests_waiting"]) == (0, 0)
    logged = several.log()  # which the last answers' lines may still be on their way to
    assert len({line["id"] for line in logged}) == len(logged)
    assert several.get("/metrics", Authorization="").status == 401


def test_more_than_may_wait_of_all_together_get_429(several):
    """16 rows, and 8 that may wait, however they are spread."""
    with several.slowly():
        answers = at_once(*[lambda: several.ask("", n=4)] * 8)
        refused = [answer for answer in answers if answer.status == 429]
    assert len(refused) == 2
    assert all(answer.text == CAPTION for answer in answers if answer.status == 200)
    # What is over makes room again, wherever it was.
    with several.slowly():
        answers = at_once(*[lambda: several.ask("", n=4)] * 6)
    assert [answer.status for answer in answers] == [200] * 6


def test_one_that_is_killed_is_replaced_and_leaves_nothing_behind(several):
    """Its clients lose their connections; its rows and what it had counted are free again."""
    before = several.metrics().get('blip2_requests_total{outcome="ok"}', 0)  # none yet: not listed
    killed = others(several)
    assert len(killed) == PROCESSES - 1
    lost = []

    def ask() -> None:
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            lost.append(several.ask("", n=4).status)

    with several.slowly():
        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        assert wait_for(lambda: several.metrics()["blip2_rows_used"] == 16, 5)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

        def rows_of_the_living() -> bool:
            alive = sum(thread.is_alive() for thread in asking)
            return several.metrics()["blip2_rows_used"] == 4 * alive

        assert wait_for(rows_of_the_living, 0.6)  # an answer takes 1.15 s
        for thread in asking:
            thread.join()
    assert wait_for(lambda: several.metrics()["blip2_rows_used"] == 0, 5)
    assert wait_for(lambda: several.metrics()["blip2_requests_waiting"] == 0, 5)
    assert wait_for(lambda: len(set(others(several)) - set(killed)) == PROCESSES - 1, 10)
    assert several.said().count("a process that speaks HTTP has ended") == PROCESSES - 1
    # Counters never fall: what a process had counted stays.
    found = [several.metrics()['blip2_requests_total{outcome="ok"}'] for _ in range(6)]
    assert min(found) == before + lost.count(200)
    with several.slowly():
        answers = at_once(*[lambda: several.ask("", n=4)] * 6)
    assert [answer.status for answer in answers] == [200] * 6
    several.check_answers()


def test_sigterm_lets_all_of_them_finish(several):
    """The last that is asked of this server."""
    connections = [several.connect() for _ in range(9)]
    with several.slowly():
        for connection in connections:
            send(connection, question("", stream=True))
        assert wait_for(lambda: several.metrics()["blip2_requests_running"] == 9, 5)
        several.process.send_signal(signal.SIGTERM)
        for _ in range(6):
            assert wait_for(lambda: several.get("/ready").status == 503, 0.8)
        assert several.ask("").error["code"] == "stopping"
        bodies = [connection.getresponse().read() for connection in connections]
    for body in bodies:
        deltas = [event["choices"][0]["delta"] for event in events(body)[:-1]]
        assert "".join(delta.get("content") or "" for delta in deltas) == CAPTION
    assert several.process.wait(8) == 0
    assert wait_for(lambda: not several.processes(), 5)
    assert "Traceback" not in several.said()


@pytest.mark.slow
def test_engines_that_die_end_all_of_them(tmp_path):
    server = start(tmp_path / "s", **FLAGS)
    try:
        server.wait_ready()
        [engines] = [
            pid
            for pid in server.processes()
            if Path(f"/proc/{pid}/comm").read_text().strip() == "blip2-engines"
        ]
        os.kill(engines, signal.SIGKILL)
        assert server.process.wait(10) == 2
        assert server.said().splitlines()[-1].startswith("error: the process with the engines")
        assert wait_for(lambda: not server.processes(), 5)
    finally:
        server.process.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_process(tmp_path):
    server = start(tmp_path / "s", **FLAGS)
    try:
        server.wait_ready()
        server.process.kill()
        assert wait_for(lambda: not server.processes(), 5)
    finally:
        server.process.kill()
