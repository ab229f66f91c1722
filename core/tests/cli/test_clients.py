"""The client commands against a small scripted server: chat and bench serve."""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dovetail.cli.bench import report, workload
from dovetail.cli.main import run


class Script:
    """What the server answers, and what it was asked."""

    def __init__(self):
        self.requests = []
        self.keys = []
        self.models = ["toy"]
        self.pieces = ["Once ", "upon", " a time."]
        self.status = 200
        self.page = None
        self.error_after = None
        self.seconds = 0.0
        self.lock = threading.Lock()
        self.in_flight = 0
        self.most_in_flight = 0


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("DOVETAIL_API_KEY", raising=False)
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            script.keys.append(self.headers["Authorization"])
            listed = {"data": [{"id": name} for name in script.models]}
            self.answer(script.status, listed if script.page is None else script.page)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                script.requests.append(body)
                script.in_flight += 1
                script.most_in_flight = max(script.most_in_flight, script.in_flight)
            time.sleep(script.seconds)
            if script.status != 200:
                self.answer(script.status, {"error": {"message": "the server is full", "type": "overloaded"}})
            else:
                self.stream(body)
            with script.lock:
                script.in_flight -= 1

        def answer(self, status, payload):
            data = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def stream(self, body):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            events = []
            for index, piece in enumerate(script.pieces):
                if script.error_after == index:
                    events.append({"error": {"message": "the engine died"}})
                    break
                chat = {"delta": {"content": piece}}
                events.append({"choices": [chat if "messages" in body else {"text": piece}]})
            events.append({"choices": [], "usage": {"completion_tokens": len(script.pieces)}})
            for event in events:
                self.wfile.write(f": comment\ndata: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    script.url = f"http://127.0.0.1:{httpd.server_port}"
    yield script
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def talk(server, monkeypatch, lines, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run(["chat", "--url", server.url, *arguments])


def test_conversation_keeps_its_turns(server, monkeypatch, capsys):
    assert talk(server, monkeypatch, ["hello", "", "and then?"], "--system", "Be brief.", "--stop", "END") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("toy at ")
    assert shown.count("Once upon a time.") == 2
    first, second = server.requests
    assert first["model"] == "toy"
    assert (first["stream"], first["max_tokens"], first["stop"]) == (True, 256, ["END"])
    assert "temperature" not in first, "the server recommends one"
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == "Once upon a time."


def test_clear_forgets_all_but_the_system_message(server, monkeypatch, capsys):
    assert talk(server, monkeypatch, ["one", "/clear", "two", "/quit", "three"], "--system", "Be brief.") == 0
    assert len(server.requests) == 2
    assert [message["content"] for message in server.requests[1]["messages"]] == ["Be brief.", "two"]


def test_unknown_slash_command_is_not_sent(server, monkeypatch, capsys):
    assert talk(server, monkeypatch, ["/claer"]) == 0
    assert "Unknown command /claer. /clear forgets" in capsys.readouterr().out
    assert server.requests == []


def test_refusal_is_shown_and_the_conversation_goes_on(server, monkeypatch, capsys):
    server.models = []
    server.status = 503
    assert talk(server, monkeypatch, ["one", "two"], "--model", "toy") == 0
    shown = capsys.readouterr().out
    assert shown.count("The server answered 503: the server is full") == 2
    assert [message["content"] for message in server.requests[1]["messages"]] == ["two"], "the failed turn is gone"


def test_error_in_mid_answer(server, monkeypatch, capsys):
    server.error_after = 1
    assert talk(server, monkeypatch, ["one"]) == 0
    assert "stopped with an error: the engine died" in capsys.readouterr().out


def test_markup_in_an_answer_is_text(server, monkeypatch, capsys):
    server.pieces = ["[bold]not", " bold[/bold] [/]"]
    assert talk(server, monkeypatch, ["one"]) == 0
    assert "[bold]not bold[/bold] [/]" in capsys.readouterr().out


def test_api_key_is_sent(server, monkeypatch):
    assert talk(server, monkeypatch, [], "--api-key", "abc") == 0
    monkeypatch.setenv("DOVETAIL_API_KEY", "def")
    assert talk(server, monkeypatch, []) == 0
    assert server.keys == ["Bearer abc", "Bearer def"]


def test_wrong_key(server, monkeypatch, capsys):
    server.status = 401
    assert talk(server, monkeypatch, []) == 1
    assert "The server answered 401" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["chat"], ["bench", "serve"]])
def test_server_without_a_model(command, server, capsys):
    server.models = []
    assert run([*command, "--url", server.url]) == 1
    assert "lists no model; name one with --model" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["<html>", {"data": 5}, [], {}])
@pytest.mark.parametrize("command", [["chat"], ["bench", "serve"]])
def test_something_else_answers(command, page, server, capsys):
    server.page = page
    assert run([*command, "--url", server.url]) == 1
    assert f"What answers at {server.url} does not list models" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["chat"], ["bench", "serve"]])
def test_no_server(command, capsys):
    assert run([*command, "--url", "http://127.0.0.1:9"]) == 1
    message = capsys.readouterr().err
    assert "error: No server answers at http://127.0.0.1:9" in message
    assert "Start one with `dovetail serve`, or name another with --url." in message


def test_bench_serve_reports_what_it_measured(server, capsys):
    server.seconds = 0.02
    words = ["--num-prompts", "7", "--concurrency", "2", "--input-len", "5", "--output-len", "3", "--json"]
    assert run(["bench", "serve", "--url", server.url, *words]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["requests"], numbers["failed"]) == (7, 0)
    assert numbers["output_tokens_per_second"] == pytest.approx(21 / numbers["seconds"])
    assert numbers["total_tokens_per_second"] == pytest.approx((21 + 35) / numbers["seconds"])
    for name in ("ttft", "tpot", "itl", "e2e"):
        assert numbers[f"{name}_p50_ms"] <= numbers[f"{name}_p99_ms"]
    assert len(server.requests) == 7
    assert server.most_in_flight == 2
    assert all(len(request["prompt"]) == 5 and request["max_tokens"] == 3 for request in server.requests)
    assert all(request["ignore_eos"] for request in server.requests)
    assert len({tuple(request["prompt"]) for request in server.requests}) == 7


def test_bench_serve_keeps_the_request_rate(server, capsys):
    assert run(["bench", "serve", "--url", server.url, "--num-prompts", "20", "--request-rate", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0.05


def test_bench_serve_when_all_requests_fail(server, capsys):
    server.status = 503
    assert run(["bench", "serve", "--url", server.url, "--num-prompts", "3", "--model", "toy"]) == 1
    assert "All 3 requests failed; the first with: DovetailError: The server answered 503" in capsys.readouterr().err


def test_percentile():
    assert report.percentile([3, 1, 2], 50) == 2
    assert report.percentile([1, 2], 50) == 1.5
    assert report.percentile([1, 2, 3, 4, 5], 90) == pytest.approx(4.6)
    assert report.percentile([7], 99) == 7
    with pytest.raises(ValueError, match="no values"):
        report.percentile([], 50)


def test_random_prompts_repeat_by_seed():
    prompts = workload.random_prompts(3, 50, 100, seed=1)
    assert prompts == workload.random_prompts(3, 50, 100, seed=1)
    assert prompts != workload.random_prompts(3, 50, 100, seed=2)
    ids = [token for prompt in prompts for token in prompt]
    assert min(ids) >= workload.FIRST_ORDINARY_TOKEN
    assert max(ids) < 100


def test_report_as_table(capsys):
    report.show("title", {"requests": 3, "seconds": 1234.5}, as_json=False)
    shown = capsys.readouterr().out
    assert "title" in shown
    assert "1,234.500" in shown


def test_stopped_answer_is_kept_as_far_as_it_came(server):
    import httpx

    from dovetail.cli.chat import Conversation

    with httpx.Client(base_url=server.url) as client:
        conversation = Conversation(client, server.url, "toy", None, {})
        answer = conversation.say("hello")
        assert next(answer) == "Once "
        answer.close()
        assert conversation.messages[-1] == {"role": "assistant", "content": "Once "}
        assert "".join(conversation.say("go on")) == "Once upon a time."


def test_interrupt_stops_the_answer_and_not_the_chat(server, monkeypatch, capsys):
    from dovetail.cli.chat import Conversation

    def interrupted(self, text):
        yield "Once"
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "say", interrupted)
    assert talk(server, monkeypatch, ["one", "two"]) == 0
    assert capsys.readouterr().out.count("Once (stopped)") == 2


def test_server_that_sends_something_else(server, monkeypatch, capsys):
    from dovetail.cli import http
    from dovetail.errors import DovetailError

    with pytest.raises(DovetailError, match="not JSON: '<html>'"):
        http.event("data: <html>")
    assert "(no message)" in str(http.refusal(502, ""))
    assert "Bad Gateway" in str(http.refusal(502, "Bad Gateway"))


def test_server_that_leaves_in_mid_conversation(server, monkeypatch, capsys):
    from dovetail.cli.chat import Conversation

    original = Conversation.__init__

    def lose(self, client, url, *rest):
        original(self, client, url, *rest)
        client.base_url = "http://127.0.0.1:9"

    monkeypatch.setattr(Conversation, "__init__", lose)
    assert talk(server, monkeypatch, ["one"]) == 0
    assert "No server answers" in capsys.readouterr().out
