from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bundles import bundle
from regraft.serve.command import register
from running import PATIENCE, Running, command, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(bundle()) as running:
        yield running


def test_it_answers_at_once_when_it_says_that_it_is_ready(server: Running) -> None:
    assert httpx.get(f"{server.url}/ready").json()["ready"] is True
    answer = httpx.post(f"{server.url}/predict", json={"inputs": ["good film", "bad"]})
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == 2


def test_the_server_process_holds_neither_torch_nor_transformers(server: Running) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "torch" not in maps


def test_a_connection_is_kept_for_many_requests(server: Running) -> None:
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=1)) as client:
        assert {client.post("/predict", json={"inputs": "good"}).status_code for _ in range(20)} == {200}


def test_who_sends_too_much_gets_to_read_why(server: Running) -> None:
    """While it still sends, as most clients do: closing on it at once would be a broken pipe there."""
    address = httpx.URL(server.url)
    connection = http.client.HTTPConnection(address.host, address.port, timeout=PATIENCE)
    connection.request("POST", "/predict", body=b"a" * (6 << 20), headers={"content-type": "application/json"})
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "body_too_large")


def test_a_port_in_use_is_one_clear_line(server: Running) -> None:
    port = server.url.rsplit(":", 1)[1]
    run = subprocess.run(command(bundle(), "--port", port), capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 2
    assert (
        run.stderr
        == f"regraft: cannot listen on 127.0.0.1, port {port}: Address already in use; --port 0 takes a free one\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_request_that_came_before_be_answered_and_ends_with_0(number: signal.Signals) -> None:
    body = json.dumps({"inputs": ["good film " * 9] * 20})
    with running_server(bundle(work=20), "--max-batch-tokens", "100") as running:
        address = httpx.URL(running.url)
        requests = [http.client.HTTPConnection(address.host, address.port, timeout=PATIENCE) for _ in range(8)]
        for request in requests:
            request.request("POST", "/predict", body=body, headers={"content-type": "application/json"})
        while not httpx.get(f"{running.url}/ready").json()["waiting_tokens"]:  # came after them
            time.sleep(0.005)
        running.process.send_signal(number)
        assert [request.getresponse().status for request in requests] == [200] * 8
        assert running.process.wait(PATIENCE) == 0
        assert running.process.stderr is not None and running.process.stderr.read() == ""


def test_what_is_not_answered_within_the_grace_time_gets_503_and_the_exit_code_says_so() -> None:
    async def talk(running: Running) -> int:
        async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE) as client:
            request = asyncio.create_task(client.post("/predict", json={"inputs": ["good film " * 9] * 1000}))
            while not (await client.get("/ready")).json()["waiting_tokens"]:
                await asyncio.sleep(0.005)
            running.process.terminate()
            return (await request).status_code

    with running_server(bundle(work=200), "--max-batch-tokens", "20", "--grace", "0.3") as running:
        assert asyncio.run(talk(running)) == 503
        assert running.process.wait(PATIENCE) == 1


def test_a_signal_while_the_model_loads_ends_it_at_once() -> None:
    process = subprocess.Popen(command(bundle(work=3000)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "onnxruntime" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.terminate()
    assert process.communicate(timeout=1.0) == (b"", b"")
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "tokenizer.json"])
def test_a_bundle_without_a_file_is_one_line_that_names_it_and_exit_code_2(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(bundle(), tmp_path / "bundle"))
    (folder / name).unlink()
    run = subprocess.run(command(folder), capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 2
    assert run.stderr.startswith("regraft: ") and name in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads: 0; expected at least 1"),
        (["--port", "70000"], "port: 70000; expected 0"),
        (["--stall", "-1"], "stall: -1.0; expected more than 0 seconds"),
    ],
)
def test_a_setting_out_of_range_is_named(arguments: list[str], message: str) -> None:
    run = subprocess.run(command(bundle(), *arguments), capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, message in run.stderr) == (2, True)


def test_a_host_that_is_not_here_is_named() -> None:
    run = subprocess.run(command(bundle(), "--host", "192.0.2.1"), capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 2
    assert "cannot listen on 192.0.2.1" in run.stderr


def test_registering_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, argparse; from regraft.serve.command import register;"
        "register(argparse.ArgumentParser().add_subparsers());"
        "print([m for m in ('numpy', 'fastapi', 'pydantic', 'onnxruntime', 'uvicorn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_subcommand_brings_its_handler() -> None:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    arguments = parser.parse_args(["serve", "nowhere", "--port", "0"])
    assert arguments.handler(arguments) == 2


def test_a_free_port_is_found_and_told(server: Running) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    assert port > 0
    socket.create_connection(("127.0.0.1", port)).close()
