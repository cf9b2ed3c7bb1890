"""The annotation server over plain HTTP: who is let in, what is kept, and that nothing is counted twice."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from experiments import annotate
from experiments.annotation import items as items_module
from experiments.annotation.items import Item
from experiments.annotation.server import MOST_BYTES, make_server
from experiments.annotation.session import Session
from experiments.annotation.store import open_store
from rlhfjax.data import Label, read_labels

ROOT = Path(__file__).parent.parent


def some_items(count: int) -> list[Item]:
    return [Item(f"item {i}", f"prompt {i}", (f"a {i}", f"b {i}"), ("sft", "ppo")) for i in range(count)]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Client(NamedTuple):
    """Speaks to a server as the page does."""

    address: str

    def ask(self, route: str, body: Any = None, **headers: str) -> Reply:
        where = urlsplit(self.address)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
        with contextlib.closing(connection):
            data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            given = {"Content-Type": "application/json"} | {
                k.replace("_", "-"): v for k, v in headers.items()
            }
            path = route if route.startswith("/") else where.path + route
            connection.request("GET" if body is None else "POST", path, data, given)
            reply = connection.getresponse()
            return Reply(reply.status, reply.headers, reply.read())

    def task(self, annotator: str = "ada") -> dict[str, Any]:
        return self.ask(f"task?annotator={annotator}").json

    def answer(self, state: dict[str, Any], choice: Any = 0, **changes: Any) -> Reply:
        task = state["task"]
        body = {"annotator": state["annotator"], "key": task["key"], "label": task["label"]}
        return self.ask("label", body | {"choice": choice, "seconds": 1.5} | changes)


def chosen(label: Label) -> str:
    assert isinstance(label.choice, int)
    return label.completions[label.choice]


@contextlib.contextmanager
def serving(session: Session) -> Iterator[Client]:
    server, address = make_server(session, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Client(address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.jsonl"


def session_at(path: Path, count: int = 4, **settings: Any) -> Session:
    if not path.exists():
        path.write_text('{"seed": "0"}\n')  # of which the orders are drawn
    return Session(some_items(count), [], open_store(path), **{"repeats": 0.0, **settings})


# ------------------------------------------------------------------------------------------------------- who gets in


def test_only_the_page_itself_is_served(path):
    with serving(session_at(path)) as client:
        port = urlsplit(client.address).port
        assert client.ask("").status == 200
        for route in ("/", "/task?annotator=ada", "/wrong/", "/wrong/task", "/favicon.ico"):
            assert client.ask(route).status == 403, route
        assert client.ask("", Host="evil.example").status == 403
        assert client.ask("", Host=f"evil.example:{port}").status == 403
        assert client.ask("", Host=f"localhost:{port}").status == 200
        assert client.ask("task?annotator=ada", Origin="http://evil.example").status == 403
        assert client.ask("../etc/passwd").status == 404
        assert client.ask("page.js").status == 404
        assert client.ask("label").status == 404  # GET
        assert client.ask("label", b"{}", Content_Type="text/plain").status == 415
        assert client.ask("label", b" " * (MOST_BYTES + 1)).status == 413
        assert client.ask("label", b"[" * 9000).status == 400
        assert client.ask("label", {}, Transfer_Encoding="chunked").status == 411
        assert client.ask("label", {}).status == 400
        with pytest.raises(OSError, match=f"port {port} cannot be had"):
            make_server(session_at(path), port or 0)
    assert read_labels(path) == []


def test_the_page_loads_nothing_and_runs_only_its_own_script(path):
    name = "</script><script>alert(1)</script>"
    with serving(session_at(path, annotator=name)) as client:
        first, second = client.ask(""), client.ask("")
    policy = first.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', first.content.decode()))
    assert f"script-src 'nonce-{nonce}'" in policy and nonce.encode() not in second.content
    page = first.content.decode()
    assert page.count("<script") == 1 and page.count("</script>") == 1
    assert not re.search(r"https?:|//[a-z]|innerHTML|eval\(|\$\w", page)


# ----------------------------------------------------------------------------------------------------- what is kept


def test_a_label_is_on_the_disk_before_the_next_pair_and_names_the_completion(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with serving(session_at(path)) as client:
        state, shown = client.task(), []
        after = state
        for _ in range(4):
            assert len(synced) == len(shown)
            shown.append(after["task"]["completions"])
            after = client.answer(after, 1).json
            assert synced[-1] == path.stat().st_size
    labels = read_labels(path)
    assert [[x.completions[i] for i in x.shown] for x in labels] == shown
    assert [chosen(x) for x in labels] == [texts[1] for texts in shown]
    assert {x.shown for x in labels} == {(0, 1), (1, 0)}
    label = labels[0]
    assert (label.annotator, label.seconds, label.systems) == ("ada", 1.5, ("sft", "ppo"))
    assert (state["done"], after["done"], after["total"], after["task"]) == (0, 4, 4, None)
    assert not {"sft", "ppo", "systems", "repeat", "gold", "item"} & set(
        re.findall(r"\w+", json.dumps(state))
    )


def test_the_same_post_again_and_a_second_window_count_once(path):
    with serving(session_at(path)) as client:
        one, other = client.task(), client.task()  # two windows show the same pair
        assert one["task"]["key"] == other["task"]["key"] and one["task"]["label"] != other["task"]["label"]
        client.answer(one, 0)
        assert client.answer(one, 0).json["notice"] == ""  # the reply was lost and the page tried again
        assert "was kept" in client.answer(one, 1).json["notice"]
        assert "was kept" in client.answer(other, 1).json["notice"]
    (label,) = read_labels(path)
    assert chosen(label) == one["task"]["completions"][0]


def test_what_was_taken_back_comes_again_and_stays_taken_back(path):
    with serving(session_at(path)) as client:
        first = client.task()
        second = client.answer(first, 0).json
        third = client.answer(second, "tie").json
        undo = {"annotator": "ada", "label": third["last"]}
        back = client.ask("undo", undo).json
        assert back["task"]["key"] == second["task"]["key"] and back["done"] == 1
        client.ask("undo", undo)  # a retry takes nothing more back
        client.answer(second, "tie")  # nor does a late retry bring the label back
        assert len(read_labels(path)) == 1
        client.ask("undo", {"annotator": "bob", "label": back["last"]})  # nor may another annotator
        assert len(read_labels(path)) == 1
        assert client.answer(back, "skip").json["done"] == 2
    assert [x.choice for x in read_labels(path)][1] == "skip"
    assert (
        len(path.read_text().splitlines()) == 1 + 3 + 1
    )  # the seed, three labels, one taken back: all are there


def test_bad_labels_are_refused_by_name(path):
    with serving(session_at(path)) as client:
        state = client.task()
        for change, why in (
            ({"choice": 2}, "choice must be 0 to 1"),
            ({"choice": True}, "choice"),
            ({"seconds": -1}, "seconds"),
            ({"seconds": float("nan")}, "seconds"),
            ({"label": "a b"}, "label"),
            ({"annotator": "x" * 65}, "a name has"),
            ({"annotator": "\n"}, "a name has"),
        ):
            reply = client.answer(state, **{"choice": 0, **change})
            assert reply.status == 400 and why in reply.json["error"], change
        assert client.answer(state, key="0" * 16).status == 409
    assert read_labels(path) == []


def test_a_full_disk_is_said_and_loses_nothing(path, monkeypatch):
    with serving(session_at(path)) as client:
        state = client.answer(client.task(), 0).json
        size = path.stat().st_size
        monkeypatch.setattr("experiments.annotation.store._write_all", half_written)
        reply = client.answer(state, 1)
        monkeypatch.undo()
        assert reply.status == 507 and "nothing was saved" in reply.json["error"]
        assert path.stat().st_size == size
        assert client.answer(state, 1).json["done"] == 2
    assert len(read_labels(path)) == 2


def half_written(descriptor: int, content: bytes) -> None:
    os.write(descriptor, content[:10])
    raise OSError(28, "No space left on device")


def test_many_windows_and_two_servers_on_one_file(path):
    with serving(session_at(path, 12)) as one, serving(session_at(path, 12)) as other:

        def work(number: int) -> None:
            client, name = (one, other)[number % 2], f"annotator{number % 3}"
            for _ in range(30):
                state = client.task(name)
                if state["task"] is None:
                    return
                client.answer(state, number % 2)

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(work, range(12)))
    labels = read_labels(path)
    assert len(labels) == 36 == len({x.task for x in labels})
    assert len(path.read_text().splitlines()) == 37


def test_numbers_are_tables_and_can_be_left_out(path):
    with serving(session_at(path)) as client:
        client.answer(client.task(), 0)
        tables = client.ask("numbers").json["tables"]
        assert [x["title"] for x in tables] == ["Agreement", "Systems", "Annotators"]
        assert tables[2]["rows"][0][:2] == ["ada", "1"]
    with serving(session_at(path, panel=False)) as client:
        assert client.ask("numbers").status == 409


# ----------------------------------------------------------------------------------------------------- a killed server


def start(source: Path, *flags: str) -> tuple[subprocess.Popen[str], Client]:
    command = [sys.executable, "experiments/annotate.py", str(source), "--repeats", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("open "))
    return process, Client(line.split()[1])


@pytest.mark.slow
def test_a_killed_server_goes_on_where_it_was(tmp_path):
    source, path = tmp_path / "items.jsonl", tmp_path / "items.labels.jsonl"
    rows = [{"prompt": f"p {i}", "completions": ["a", "b"]} for i in range(400)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process, client = start(source)
    acknowledged = []

    def work() -> None:
        state = client.task()
        with contextlib.suppress(OSError, http.client.HTTPException):
            while state["task"]:
                label = state["task"]["label"]
                state = client.answer(state, 0).json
                acknowledged.append(label)

    thread = threading.Thread(target=work)
    thread.start()
    while len(acknowledged) < 20:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    thread.join()
    process.wait()
    kept = [x.label for x in read_labels(path)]
    assert kept[: len(acknowledged)] == acknowledged and len(kept) - len(acknowledged) in (0, 1)
    with open(path, "ab") as file:
        file.write(b'{"label": "0123", "item": "ha')  # as a kill in the middle of a write leaves it
    process, client = start(source)
    try:
        state = client.task()
        assert state["done"] == len(kept) and state["total"] == 400
        assert client.answer(state, 1).json["done"] == len(kept) + 1
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert [x.label for x in read_labels(path)] == [*kept, state["task"]["label"]]


# ------------------------------------------------------------------------------------------------------ command line


def test_mistakes_are_said_before_anything_is_served(tmp_path, capsys):
    good = tmp_path / "items.jsonl"
    good.write_text('{"prompt": "p", "completions": ["a", "b"]}\n')
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "completions": ["a"]}\n')
    for arguments, why in (
        ([str(tmp_path / "none.jsonl")], "no data file"),
        ([str(bad)], "bad.jsonl:1: completions must be a list of two texts or more"),
        ([str(good), "--repeats", "2"], "--repeats 2.0 must lie between 0 and 1"),
        ([str(good), "--gold", str(good)], "has no `gold`"),
        ([str(good), "--select", "disagreement"], "needs two reward models or more"),
        ([str(good), "--labels", str(tmp_path)], "is a folder"),
        ([str(good), "--labels", str(good)], "choice must be the number of a completion"),
        ([str(tmp_path)], "no texts of a stage 'validation'"),
        (["export", str(good), str(tmp_path / "out")], "choice"),
    ):
        assert annotate.main(arguments) == 2
        assert why in capsys.readouterr().err, arguments
    assert good.read_text().count("\n") == 1 and items_module.read_items(good)[0].completions == ("a", "b")
