"""The studio without a browser: who may ask, what is refused, jobs in order, and Python that does the same."""

from __future__ import annotations

import io
import json
import random
import threading
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

import regard
from regard.circuits._patching import Contrast
from regard.cli import circuits
from regard.data import prompts
from regard.evaluation.faithfulness import deletion_error
from regard.gaze.compare import measures
from regard.gaze.compare_pictures import enlarged_map, model_maps
from regard.gaze.nss import nss
from regard.interventions import after_steps, scale_attention, scale_heads
from regard.studio import jobs as queued
from regard.studio import server, steps
from regard.studio.jobs import plainly
from regard.studio.work import Desk, Given

TOKEN, HOST = "a-token-of-the-tests", "127.0.0.1:8000"
TEXT = "The king spoke to the queen, and the queen spoke to the"
MUTE = {"kind": "heads", "heads": [[3, 5, 0.0]]}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    return Desk(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def stranger(desk):
    """A client that has no token."""
    app = server.app(desk, TOKEN, {HOST})
    return TestClient(app, base_url=f"http://{HOST}", follow_redirects=False, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(stranger):
    known = TestClient(stranger.app, base_url=f"http://{HOST}", follow_redirects=False, raise_server_exceptions=False)
    known.headers["authorization"] = f"Bearer {TOKEN}"
    return known


def told(client, path: str, body: dict) -> list[tuple[str, dict]]:
    """What a job tells until it ends."""
    started = client.post(path, json=body)
    assert started.status_code == 200, started.text
    found, name = [], ""
    with client.stream("GET", f"/api/jobs/{started.json()['id']}/events") as stream:
        for line in stream.iter_lines():
            kind, _, rest = line.partition(": ")
            if kind == "event":
                name = rest
            elif kind == "data":
                found.append((name, json.loads(rest)))
    return found


@pytest.fixture(scope="module")
def looked(client) -> str:
    """The id of a recording of the reader."""
    events = dict(told(client, "/api/jobs/look", {"model": "reader", "text": TEXT, "generate": 6}))
    assert "done" in events, events
    return events["saved"]["id"]


# Who may ask.


@pytest.mark.parametrize("path", ["/", "/api/models", "/view/studio.js", "/api/recordings", "/api/openapi.json"])
def test_without_the_token_nothing_is_told(stranger, path):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}, {"cookie": "x=y"}):
        assert stranger.get(path, headers=headers).status_code == 403
    assert stranger.get(f"{path}?token=wrong").status_code == 403
    assert stranger.get(f"{path}?token=").status_code == 403


def test_the_printed_address_sets_a_cookie_that_scripts_and_other_sites_do_not_have(stranger):
    answer = stranger.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert stranger.get("/").status_code == 200  # the client keeps it
    stranger.cookies.clear()
    assert stranger.get(f"/api/models?token={TOKEN}").status_code == 403  # addresses of data hold no token


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:8001", "localhost.evil.example:8000", ""])
def test_another_host_is_refused_even_with_the_token(client, host):
    """A name that was made to point at 127.0.0.1."""
    assert client.get("/api/models", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8000", "http://127.0.0.1:8001"])
def test_another_origin_is_refused_even_with_the_token(client, origin):
    assert client.get("/api/models", headers={"origin": origin}).status_code == 403
    assert client.post("/api/uploads", content=b"x", headers={"origin": origin}).status_code == 403
    assert client.get("/api/models", headers={"origin": f"http://{HOST}"}).status_code == 200
    assert client.get("/api/models", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_every_answer_has_the_policy(client, stranger):
    for answer in (client.get("/"), client.get("/api/models"), client.get("/none"), stranger.get("/")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


# What is refused.


@pytest.mark.parametrize(
    "path",
    [
        "/view/..%2f..%2fcatalog.py",
        "/view/%2e%2e%2freport.py",
        "/view/report.html",
        "/view//etc/passwd",
        "/api/recordings/..%2f..%2fetc",
        "/api/recordings/....",
        "/api/recordings/20260101-000000-abcdef",
        "/api/recordings/%2fetc%2fpasswd/card",
        "/api/jobs/..%2f1/events",
        "/api/papers/..%2f..",
    ],
)
def test_no_path_of_a_client_is_opened(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", ["/etc", "../reader", ".", "~/model", "a/../b", "C:\\models", "a/b/c", ""])
def test_models_are_named_not_reached_by_a_path(client, name):
    name, (kind, what) = name, told(client, "/api/jobs/open", {"model": name})[-1]
    assert kind == "failed"
    assert "no model of this studio" in what["why"]


def test_a_folder_here_is_no_hub_id(desk, tmp_path, monkeypatch):
    (tmp_path / "own" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no model of this studio"):
        desk.where("own/model")
    assert desk.where("somebody/model") == "somebody/model"


def test_uploads_are_limited_in_bytes_and_pixels(client, monkeypatch):
    assert client.post("/api/uploads", content=b"x" * (server.LARGEST_UPLOAD + 1)).status_code == 413

    def unsized():
        for _ in range(20):
            yield b"x" * 2**20

    assert client.post("/api/uploads", content=unsized()).status_code == 413
    assert client.post("/api/jobs/look", content=b" " * (server.LARGEST_REQUEST + 1)).status_code == 413
    held = io.BytesIO()
    Image.new("1", (9000, 9000)).save(held, "png")  # 10 kB that would be 81 million pixels
    answer = client.post("/api/uploads", content=held.getvalue())
    assert answer.status_code == 400
    assert "pixels" in answer.json()["why"]


def test_broken_uploads_are_refused_in_words(client):
    held = io.BytesIO()
    Image.new("RGB", (24, 24), "red").save(held, "png")
    whole, draw = held.getvalue(), random.Random(0)
    assert client.post("/api/uploads", content=whole).json()["width"] == 24
    for start in (whole, b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), b"", b"GIF89a"):
        for _ in range(40):
            broken = bytearray(start[: draw.randrange(len(start) + 1)])
            for _ in range(draw.randrange(4)):
                if broken:
                    broken[draw.randrange(len(broken))] = draw.randrange(256)
            answer = client.post("/api/uploads", content=bytes(broken))
            assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/jobs/look", {"generate": -1}),
        ("/api/jobs/look", {"generate": 10**9}),
        ("/api/jobs/look", {"upload": "../../etc"}),
        ("/api/jobs/look", {"turns": [{"role": "root", "content": "x"}]}),
        ("/api/jobs/change", {"recording": "20260101-000000-abcdef", "steps": [{"kind": "code", "on": True}]}),
        ("/api/jobs/change", {"recording": "x", "steps": [{"kind": "heads", "heads": [[0, 0, 1e999]]}]}),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(client, path, body):
    answer = client.post(path, content=json.dumps(body))
    assert answer.status_code == 422
    assert answer.json()["why"]


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/api/jobs/look", {"generate": -1}, "Tokens to generate: give 0 or more"),
        ("/api/jobs/look", {"generate": 513}, "Tokens to generate: give 512 or less"),
        ("/api/jobs/circuit", {"model": "reader", "clean": "", "corrupted": "a"}, "Clean prompt: is empty"),
    ],
)
def test_wrong_fields_are_told_in_the_words_of_the_page(client, path, body, why):
    assert client.post(path, json=body).json()["why"] == why


def test_no_option_of_the_command_line_is_told():
    said = "the text has 6002 tokens, but reader has 1024 positions; shorten it, or cut it with --truncate"
    assert plainly(said) == "the text has 6002 tokens, but reader has 1024 positions; shorten it"


@pytest.mark.parametrize(("name", "takes"), [("reader", {"text", "generate"}), ("painter", {"text", "paints"})])
def test_what_a_model_takes_is_told(client, name, takes):
    told_of = dict(told(client, "/api/jobs/open", {"model": name}))["model"]
    assert {what for what, does in told_of["takes"].items() if does} == takes


# Jobs.


def test_jobs_of_a_model_run_one_at_a_time_and_are_cancelled_where_they_wait_and_run():
    all_jobs, running, most = queued.Jobs(), 0, 0
    hold, begun = threading.Event(), threading.Event()

    def work(job):
        nonlocal running, most
        running += 1
        most = max(most, running)
        begun.set()
        while not hold.wait(0.005):
            try:
                job.check()
            except queued.Cancelled:
                running -= 1
                raise
        running -= 1

    first, waiting, last = (all_jobs.add("one", work) for _ in range(3))
    assert begun.wait(5)
    assert waiting.events[0] == ("queued", {"before": 1})
    all_jobs.cancel(waiting.id)
    all_jobs.cancel(first.id)

    def ended(job) -> str:
        for _ in range(1000):
            if job.done:
                return job.events[-1][0]
            threading.Event().wait(0.005)
        raise AssertionError("the job does not end")

    assert (ended(first), ended(waiting)) == ("cancelled", "cancelled")
    hold.set()
    assert ended(last) == "done"
    assert most == 1


def test_a_stopped_run_leaves_the_model_as_it_was(client, desk, looked):
    model, tokenizer = desk.model("reader")
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    started = client.post("/api/jobs/look", json={"model": "reader", "text": TEXT, "generate": 400}).json()["id"]
    names = []
    with client.stream("GET", f"/api/jobs/{started}/events") as stream:
        for line in stream.iter_lines():
            names.append(line)
            if line == "event: said" and names.count("event: said") == 1:
                client.delete(f"/api/jobs/{started}")
    assert "event: cancelled" in names or "event: failed" in names
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_fifty_clients_at_once(client, looked):
    def ask(i: int) -> int:
        return client.get(f"/api/recordings/{looked}" if i % 2 else "/api/papers?words=sink").status_code

    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(ask, range(50))) == {200}


# Look and change.


def test_a_look_is_kept_listed_and_opened_by_another_studio(client, desk, looked):
    assert looked in [one["id"] for one in client.get("/api/recordings").json()]
    header = client.get(f"/api/recordings/{looked}").json()
    assert header["stacks"][0]["name"] == "language_model"
    other = Desk(desk.folder)  # as after kill -9 and a new start
    page = other.page(looked)
    assert page.header["stacks"][0]["key"]["token"] == header["stacks"][0]["key"]["token"]
    assert regard.open(desk.folder / looked / "recording.zarr").tree["language_model"]["rows"].size
    assert client.get(f"/api/recordings/{looked}/blocks/{len(page.blocks)}").status_code == 404


def test_what_a_page_was_told_of_can_be_asked_about_at_once(desk):
    asked = []

    class Eager(queued.Job):
        def tell(self, name: str, /, **what) -> None:
            super().tell(name, **what)
            if name == "page":  # as a page that asks before the recording is on the disk
                asked.append(pool.submit(desk.card, what["id"]))

    with ThreadPoolExecutor() as pool:
        given = Given(model="reader", text="Tom went home.")
        desk.look(Eager(1, "reader", lambda _: None), given)
    assert [one.result()["title"] for one in asked] == ["Tom went home."]


def test_what_was_not_saved_whole_is_not_listed(desk, looked):
    (desk.folder / "20200101-000000-abcdef").mkdir()
    assert "20200101-000000-abcdef" not in [one["id"] for one in desk.listed()]


@pytest.mark.parametrize(
    "asked",
    [
        [MUTE],
        [{"kind": "heads", "heads": [[2, 1, 2.5], [4, 0, 0.0]]}, {"kind": "attention", "keys": [1, 2], "factor": 0.0}],
        [{"kind": "method", "key": "attention_buckets", "knobs": {}}],
        [{**MUTE, "on": False}, {"kind": "attention", "keys": [3], "queries": [8], "layers": [2], "factor": 4.0}],
    ],
    ids=["mute", "scale and cut", "processor or method", "switched off"],
)
def test_as_python_gives_the_same_numbers(client, desk, looked, asked):
    body = {"recording": looked, "steps": asked}
    events = told(client, "/api/jobs/change", body)
    named = dict(events)
    assert "done" in named, events
    made = exec_python(client, body)
    page = next(what for name, what in events if name == "page" and not what["partial"])
    assert made["said"] == page["said"]
    for bar in page["bars"]:
        assert float(made["shares"][bar["id"]]) == pytest.approx(bar["share"], rel=1e-5, abs=1e-7)
    answer = named["answer"]
    assert "".join(words for words, _ in answer["said"]["after"]).split() == made["said"].split()
    assert any(before != pytest.approx(after, rel=1e-4) for _, before, after in answer["step"]["rows"])


def exec_python(client, body: dict) -> dict:
    code = client.post("/api/python", json=body).json()["code"]
    made: dict = {}
    exec(compile(code, "studio.py", "exec"), made)
    return made


def wav(seconds: float = 1.0) -> bytes:
    """A tone that rises."""
    held, time = io.BytesIO(), np.arange(int(16000 * seconds)) / 16000
    with wave.open(held, "wb") as file:
        file.setparams((1, 2, 16000, len(time), "NONE", ""))
        file.writeframes((8000 * np.sin(2 * np.pi * (300 + 200 * time) * time)).astype("<i2").tobytes())
    return held.getvalue()


def test_as_python_of_a_sound_gives_the_same_words(client, desk):
    sent = client.post("/api/uploads", content=wav()).json()
    assert (sent["kind"], sent["seconds"]) == ("sound", 1.0)
    heard = dict(told(client, "/api/jobs/look", {"model": "listener", "upload": sent["id"]}))
    assert "saved" in heard, heard
    stack = client.get(f"/api/recordings/{heard['saved']['id']}").json()["stacks"][-1]["name"]
    steps_ = [{"kind": "heads", "stack": stack, "heads": [[0, 0, 0.0], [1, 1, 3.0]]}]
    body = {"recording": heard["saved"]["id"], "steps": steps_}
    fresh = Desk(desk.folder)  # another studio, which was never sent the sound
    assert fresh.again(body["recording"]).inputs["input_features"].shape[0] == 1
    page = next(what for name, what in told(client, "/api/jobs/change", body) if name == "page")
    made = exec_python(client, body)
    assert made["said"] == page["said"]
    for bar in page["bars"]:
        assert float(made["shares"][bar["id"]]) == pytest.approx(bar["share"], rel=1e-4, abs=1e-7)


def test_as_python_of_the_painter_paints_the_same(client, desk):
    saved = dict(told(client, "/api/jobs/look", {"model": "painter", "text": "a red circle and a blue star"}))["saved"]
    stack = client.get(f"/api/recordings/{saved['id']}").json()["stacks"][0]["name"]
    body = {"recording": saved["id"], "steps": [{"kind": "heads", "stack": stack, "heads": [[0, 0, 0.0], [1, 1, 0.0]]}]}
    page = dict(told(client, "/api/jobs/change", body))["page"]
    painted = np.asarray(desk._answers[page["id"]].picture, int)
    assert np.abs(np.asarray(exec_python(client, body)["picture"], int) - painted).max() <= 1
    assert np.abs(np.asarray(desk._answers[saved["id"]].picture, int) - painted).max() > 10


def test_what_acts_between_steps_of_painting_does_so_in_order():
    class Adds:
        def __init__(self, name):
            self.name = name

        def on_step_end(self, pipe, step, when, kept):
            return {"said": kept["said"] + self.name}

    assert after_steps([object()]) == {}
    act = after_steps([Adds("a"), object(), Adds("b")])["callback_on_step_end"]
    assert act(None, 0, None, {"said": ""}) == {"said": "ab"}


def test_a_change_of_nothing_is_refused(client, looked):
    for asked in ([], [{**MUTE, "on": False}]):
        assert told(client, "/api/jobs/change", {"recording": looked, "steps": asked})[-1][0] == "failed"
    wrong = [{"kind": "heads", "heads": [[99, 0, 0.0]]}]
    name, what = told(client, "/api/jobs/change", {"recording": looked, "steps": wrong})[-1]
    assert (name, "no layer 99" in what["why"]) == ("failed", True)


def test_the_painter_paints_both(client):
    events = told(client, "/api/jobs/look", {"model": "painter", "text": "a red circle"})
    named = dict(events)
    assert named["page"]["picture"].startswith("data:image/")
    change = {"recording": named["saved"]["id"], "steps": [{"kind": "heads", "stack": "", "heads": [[0, 0, 0.0]]}]}
    header = client.get(f"/api/recordings/{change['recording']}").json()
    change["steps"][0]["stack"] = header["stacks"][0]["name"]
    answer = dict(told(client, "/api/jobs/change", change))["answer"]
    (view,) = answer["views"]
    assert view["after"]["source"] not in (view["before"]["source"], view["apart"]["source"])


def test_pictures_and_classes(client, picture):
    sent = client.post("/api/uploads", content=picture.read_bytes()).json()
    events = dict(told(client, "/api/jobs/look", {"model": "viewer", "upload": sent["id"]}))
    header = client.get(f"/api/recordings/{events['page']['id']}").json()
    change = {"recording": events["saved"]["id"], "steps": []}
    change["steps"] = [{"kind": "heads", "stack": header["stacks"][0]["name"], "heads": [[1, 0, 0.0]]}]
    assert dict(told(client, "/api/jobs/change", change))["answer"]["kind"] == "class"
    loaded = regard.load("viewer")  # whose labels do not exclude each other
    with torch.no_grad():
        logits = loaded.model(**loaded.processor(images=Image.open(picture), return_tensors="pt")).logits[0]
    wanted = logits.sigmoid().topk(len(events["page"]["bars"])).values.tolist()
    assert [bar["share"] for bar in events["page"]["bars"]] == pytest.approx(wanted, abs=1e-5)


def test_two_methods_explain_side_by_side(client, desk, looked):
    asked = {"recording": looked, "methods": ["gradient_x_input", "integrated_gradients"]}
    events = told(client, "/api/jobs/explain", asked)
    scores = [what for name, what in events if name == "scores"]
    assert [one["method"] for one in scores] == asked["methods"], events
    model, tokenizer = desk.model("reader")
    inputs = tokenizer(TEXT, return_tensors="pt")
    wanted = regard.attribute(model, inputs, method="gradient_x_input", processor=tokenizer)[0]
    (part,) = scores[0]["parts"]
    assert part["values"] == pytest.approx(wanted.values.tolist(), rel=1e-4, abs=1e-6)
    assert part["words"] == wanted.text.values.tolist()
    curves = [what for name, what in events if name == "curves"]
    assert [one["method"] for one in curves] == asked["methods"]
    batched = regard.attribute(model, inputs, method="gradient_x_input")
    assert curves[0]["deletion_error"] == pytest.approx(float(deletion_error(model, inputs, batched)[0]), rel=1e-4)
    assert len(curves[0]["moved_insertion_score"]) > 1
    wrong = {"recording": looked, "methods": ["nothing_like_it"]}
    assert told(client, "/api/jobs/explain", wrong)[-1][0] == "failed"


def test_a_generated_token_is_explained_by_what_stood_before_it(client, desk, looked):
    asked = {"recording": looked, "methods": ["gradient_x_input"], "word": 2}
    events = told(client, "/api/jobs/explain", asked)
    scores = next(what for name, what in events if name == "scores")
    model, tokenizer = desk.model("reader")
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    end = inputs["input_ids"].shape[1] + 2
    wanted = regard.attribute(model, {"input_ids": ids[:, :end]}, int(ids[0, end]), method="gradient_x_input")[0]
    assert scores["parts"][0]["values"] == pytest.approx(wanted.values.tolist(), rel=1e-4, abs=1e-6)
    assert told(client, "/api/jobs/explain", {**asked, "word": 99})[-1][0] == "failed"


def test_words_of_a_picture_and_of_a_sound_are_explained_over_it(client, picture):
    seen = client.post("/api/uploads", content=picture.read_bytes()).json()["id"]
    heard = client.post("/api/uploads", content=wav()).json()["id"]
    for given, word in (
        ({"model": "describer", "text": "describe", "upload": seen, "generate": 3}, 2),
        ({"model": "listener", "upload": heard}, 1),
    ):
        saved = dict(told(client, "/api/jobs/look", given))["saved"]["id"]
        asked = {"recording": saved, "methods": ["gradient_x_input"], "word": word}
        events = told(client, "/api/jobs/explain", asked)
        scores = next(what for name, what in events if name == "scores")
        assert scores["parts"][-1]["picture"]["source"].startswith("data:image/")
        assert np.abs(scores["parts"][-1]["map"]).max() > 0
        assert "curves" in dict(events)


def test_which_methods_fit_is_found_by_asking(client, looked):
    events = dict(told(client, "/api/jobs/methods", {"recording": looked}))["methods"]
    assert {"integrated_gradients", "rollout"} <= set(events["fits"])
    assert "ReLU" in events["others"]["guided_grad_cam"]
    assert "paint" in events["others"]["refam"]


def test_a_circuit_is_that_of_the_command(client, desk):
    """As `regard circuits` has it of one prompt."""
    line = dict(told(client, "/api/jobs/example", {"model": "reader", "task": "induction"}))["example"]
    events = told(client, "/api/jobs/circuit", {"model": "reader", "heads": 3, **line})
    named = dict(events)
    assert events[-1][0] == "done", events[-1]
    assert [name for name, _ in events if name not in ("queued", "progress", "done")] == [
        "contrast", "heads", "patching", "faithfulness", "paths",
    ]  # fmt: skip
    model, tokenizer = desk.model("reader")
    put = prompts.stacked([circuits.encoded(line, tokenizer)], tokenizer)
    contrast = Contrast(model, put.inputs, put.corrupted, put.difference, stack="language_model")
    table = contrast.by_head().transpose("layer", "head").values
    np.testing.assert_allclose(np.array(named["heads"]["effect"], float), table, rtol=1e-4, atol=1e-5)
    best = np.unravel_index(np.argsort(-abs(table), axis=None)[:3], table.shape)
    assert named["paths"]["nodes"] == [[int(layer), int(head)] for layer, head in zip(*best)]
    assert named["faithfulness"]["ours"][-1] == pytest.approx(1)
    name, what = told(client, "/api/jobs/circuit", {"model": "reader", **line, "corrupted": "Another one"})[-1]
    assert (name, "tokens" in what["why"]) == ("failed", True)


def test_fixations_beside_maps_are_scored_as_the_library_does(client, desk, picture):
    sent = client.post("/api/uploads", content=picture.read_bytes()).json()
    looked_at = dict(told(client, "/api/jobs/look", {"model": "viewer", "upload": sent["id"]}))["saved"]["id"]
    spots = [(0.3, 0.4), (0.5, 0.5), (0.6, 0.2), (2.0, 0.5)]
    wide, high = sent["width"], sent["height"]
    lines = ["subject,x,y,duration", *(f"ann,{x * wide},{y * high},{100 + i}" for i, (x, y) in enumerate(spots))]
    file = client.post("/api/files", content="\n".join(lines).encode()).json()["id"]
    asked = {"recording": looked_at, "upload": file}
    named = dict(told(client, "/api/jobs/gaze", asked))
    (trial,) = named["gaze"]["trials"]
    np.testing.assert_allclose(trial["places"], spots, atol=1e-6)
    assert (trial["starts"], named["gaze"]["beside"]) == ([0, 100, 201, 303], 1)
    model, processor = desk.model("viewer")
    maps = model_maps(model, processor, Image.open(picture).convert("RGB"), {})
    path = regard.gaze.Scanpath(np.array(spots[:3]) * 64, (64, 64))
    wanted = nss(enlarged_map(maps["rollout"]), path)
    found = {str(one["name"]): one["scores"] for one in named["maps"]["maps"]}
    assert found["rollout"]["nss"] == pytest.approx(wanted, rel=1e-3)
    assert named["maps"]["heads"][1][0] == found["[1, 0]"]["nss"]
    broken = client.post("/api/files", content=b"subject,x,y\nann,1,two\n").json()["id"]
    name, what = told(client, "/api/jobs/gaze", {**asked, "upload": broken})[-1]
    assert (name, "line 2" in what["why"], "/tmp" in what["why"]) == ("failed", True, False)


def test_words_that_were_read_are_correlated_with_what_the_model_does(client, desk, looked):
    words = TEXT.split()
    lines = ["subject;word;duration", *(f"ann;{i + 1};{100 * (1 + i % 4)}" for i in range(len(words)))]
    file = client.post("/api/files", content="\n".join(lines).encode()).json()["id"]
    named = dict(told(client, "/api/jobs/gaze", {"recording": looked, "upload": file}))
    (trial,) = named["reading"]["trials"]
    assert (trial["places"], trial["starts"][:3]) == (list(range(len(words))), [0, 100, 300])
    model, tokenizer = desk.model("reader")
    received = measures(model, tokenizer, tuple(words))["received"][2, 3]
    times = 100 * (1 + np.arange(len(words)) % 4)
    assert named["maps"]["heads"][2][3] == pytest.approx(spearmanr(times, received).statistic, abs=1e-6)
    for wrong, why in (
        (b"word\n99\n", "the text has"),
        (b"a,b\n1,2\n", "no column"),
        (b"word,duration\n1,x\n", "line 2"),
    ):
        file = client.post("/api/files", content=wrong).json()["id"]
        name, what = told(client, "/api/jobs/gaze", {"recording": looked, "upload": file})[-1]
        assert (name, why in what["why"]) == ("failed", True), what


def test_edits_by_hand_change_the_vote_as_the_arithmetic_says(client):
    def edited(**body) -> dict:
        return dict(told(client, "/api/jobs/edit", {"item": 3, **body}))["edited"]

    plain, mask = edited(), [9, 10, 17]
    assert plain["votes"][0] == plain["votes"][1]  # correspondences that are given are those that are found
    near = plain["neighbours"][0]
    place = (near["own"][9] + 27) % 64
    after = edited(mask=mask, moved=[[0, 9, place]])
    assert after["votes"][0] == plain["votes"][0]
    assert sum(after["votes"][1]) == after["voters"]
    one, other = (of["neighbours"][0]["similarity"] for of in (plain, after))
    assert [i for i in range(64) if abs(one[i] - other[i]) > 1e-4] == [9]
    assert other[9] < one[9]
    for of in after["neighbours"]:
        assert of["score"] == pytest.approx(sum(of["similarity"][i] for i in mask) / 64, abs=1e-4)
    most = max(range(4), key=lambda i: (after["votes"][1][i], -i))
    assert after["answers"][1] == after["names"][most]
    assert client.post("/api/jobs/edit", json={"mask": [64]}).status_code == 422


def test_a_picture_of_one_s_own_is_named_by_its_neighbours_too(client):
    """One of the claim's, uploaded, is named as it is there; what is no picture is refused."""
    from regard.claims.attribution import chm_corr
    from regard.data.scenes import render

    scene = chm_corr.biased_scenes(chm_corr.ASKED, chm_corr.HELD, 1 - chm_corr.BIAS)[0][3]
    held = io.BytesIO()
    render([scene], 64).image().save(held, "png")
    own = client.post("/api/uploads", content=held.getvalue()).json()["id"]
    plain, found = (dict(told(client, "/api/jobs/edit", body))["edited"] for body in ({"item": 3}, {"upload": own}))
    assert found["truth"] is None
    assert {**found, "truth": plain["truth"]} == plain
    moved = dict(told(client, "/api/jobs/edit", {"upload": own, "mask": [9]}))["edited"]
    assert moved["votes"][0] == plain["votes"][0] != moved["votes"][1]
    file = client.post("/api/files", content=b"a,b").json()["id"]
    for upload, why in ((file, "no picture"), ("0" * 16, "no longer here")):
        name, what = told(client, "/api/jobs/edit", {"upload": upload})[-1]
        assert (name, why in what["why"]) == ("failed", True)


# Names that were mistyped.


@pytest.mark.parametrize(
    ("path", "body", "meant"),
    [
        ("/api/jobs/open", {"model": "raeder"}, "did you mean reader?"),
        ("/api/jobs/look", {"model": "Viewer"}, "did you mean viewer?"),
        ("/api/jobs/change", {"steps": [{"kind": "method", "key": "vhrr"}]}, "did you mean vhr?"),
        ("/api/jobs/change", {"steps": [{"kind": "method", "key": "var", "knobs": {"q": "1"}}]}, "no such knob"),
        ("/api/jobs/change", {"steps": [{"kind": "heads", "heads": [[9, 0, 0.0]]}]}, "layers 0 to 5, and no layer 9"),
        ("/api/jobs/change", {"steps": [{"kind": "heads", "heads": [[2, 8, 0.0]]}]}, "has 8 heads, and no head 8"),
        ("/api/jobs/explain", {"methods": ["rolout"]}, "did you mean rollout?"),
    ],
)
def test_what_was_mistyped_is_told_with_what_may_be_meant(client, looked, path, body, meant):
    name, what = told(client, path, body if "model" in body else {"recording": looked, **body})[-1]
    assert name == "failed"
    assert meant in what["why"], what


def test_a_paper_that_was_mistyped_is_told_with_what_may_be_meant(client):
    assert "did you mean chm-corr" in client.get("/api/papers/chm-cor").json()["why"]


# Forms and papers.


def test_every_intervention_has_a_form(client):
    from regard import catalog

    forms = {form["key"]: form for form in client.get("/api/interventions").json()}
    assert list(forms) == catalog.methods("interventions")
    knobs = {knob["name"]: knob for knob in forms["var"]["knobs"]}
    assert (knobs["p"]["kind"], knobs["p"]["default"]) == ("number", "0.6")
    assert knobs["p"]["about"].startswith("share of the attention on sinks that is moved")
    assert all(form["about"] and form["title"] for form in forms.values())


def test_what_a_docstring_says_of_a_knob():
    doc = "A thing.\n\na: the first, of two\nlines; more. b, c: the others. d: last."
    assert [steps.told(doc, name) for name in "abde"] == ["the first, of two lines; more", "the others", "last", ""]


def test_papers_have_parity_and_verdicts(client):
    assert "var" in [row["key"] for row in client.get("/api/papers?words=visual+sink").json()]
    row = client.get("/api/papers/var").json()
    assert row["parity"]
    assert row["runs"][0]["verdict"] in ("held", "did not hold", "cannot tell")
    assert client.post("/api/jobs/claim/none", json={}).status_code == 404


# The two interventions by hand.


@pytest.fixture(scope="module")
def reader():
    model, tokenizer = regard.load("reader")
    return model, tokenizer(TEXT, return_tensors="pt")


def rows(model, inputs, *things):
    with torch.inference_mode(), regard.intervene(model, *things), regard.record(model, "rows") as recording:
        model(**inputs)
    return torch.from_numpy(recording.tree["language_model"]["rows"].values[0])


def test_attention_that_is_cut_goes_to_the_other_keys(reader):
    model, inputs = reader
    plain, cut = rows(model, inputs), rows(model, inputs, scale_attention([2], queries=[5], layers=[0], heads=[1]))
    wanted = plain[0, 1, 5].clone()
    wanted[2] = 0
    torch.testing.assert_close(cut[0, 1, 5], wanted / wanted.sum(), atol=1e-5, rtol=1e-4)
    same = torch.ones(plain.shape[:3], dtype=torch.bool)
    same[0, 1, 5] = False
    torch.testing.assert_close(cut[0][same[0]], plain[0][same[0]])
    tripled = rows(model, inputs, scale_attention([2], 3.0, queries=[5], layers=[0], heads=[1]))[0, 1, 5]
    wanted = plain[0, 1, 5].clone()
    wanted[2] *= 3
    torch.testing.assert_close(tripled, wanted / wanted.sum(), atol=1e-5, rtol=1e-4)


def test_a_head_that_is_doubled_gives_twice(reader):
    model, inputs = reader
    seen = []

    class Look:
        def output(self, call, output):
            seen.append(output[:, 5].clone())
            return output

    with torch.inference_mode(), regard.intervene(model, scale_heads({(0, 5): 2.0}), Look()):
        model(**inputs)
    doubled = seen[0]
    seen.clear()
    with torch.inference_mode(), regard.intervene(model, Look()):
        model(**inputs)
    torch.testing.assert_close(doubled, 2 * seen[0])


def test_what_is_not_there_is_refused(reader):
    model, inputs = reader
    for wrong, match in (
        (lambda: scale_heads({}), "change nothing"),
        (lambda: scale_heads({(0, 0): 1.0}), "change nothing"),
        (lambda: scale_attention([]), "name the keys"),
        (lambda: scale_attention([1], 1.0), "would change nothing"),
        (lambda: scale_attention([1], -1.0), "would change nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
    for thing, match in (
        (scale_heads({(99, 0): 0.0}), "no layer 99"),
        (scale_heads({(0, 99): 0.0}), "no head 99"),
        (scale_heads({(0, 0): 0.0}, stack="vision_tower"), "no stack 'vision_tower'"),
        (scale_attention([1], layers=[99]), "no layer 99"),
    ):
        with pytest.raises(ValueError, match=match), torch.no_grad(), regard.intervene(model, thing):
            model(**inputs)
