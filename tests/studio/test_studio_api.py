"""The studio's addresses, asked what its schema allows and what it does not: each answer is as the schema says.

What is accepted as a job ends: done, refused in words, or stopped. What is allowed is asked of a recording and a model
that are there, since it would say little of others.
"""

from __future__ import annotations

import itertools
import re
import time
from contextlib import suppress
from functools import partial

import pytest

pytest.importorskip("schemathesis", reason="needs schemathesis")
pytest.importorskip("fastapi", reason="needs the studio")
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from starlette.testclient import TestClient

from regard.studio import server
from regard.studio.jobs import Job, Jobs
from regard.studio.work import Desk

TOKEN, HOST = "a-token-of-the-tests", "127.0.0.1:8000"
HEADERS = {"authorization": f"Bearer {TOKEN}", "host": HOST}
LONGEST = 0.3  # seconds that a job may run before it is stopped
EACH = settings(deadline=None, suppress_health_check=[*HealthCheck], derandomize=True, database=None)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A client of a studio, and its jobs."""
    held = []

    class Held(Jobs):
        def __init__(self) -> None:
            super().__init__()
            held.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "Jobs", Held)
        patch.setenv("HF_HUB_OFFLINE", "1")  # ids of models that are drawn are not asked for
        app = server.app(Desk(tmp_path_factory.mktemp("studio")), TOKEN, {HOST})
        client = TestClient(app, base_url=f"http://{HOST}", headers=HEADERS, raise_server_exceptions=False)
        yield client, held[0]


def end(job: Job, longest: float = LONGEST) -> tuple[str, dict]:
    """What a job told last; it is stopped where it takes long."""
    started = time.monotonic()
    while not job.done:
        time.sleep(0.005)
        if time.monotonic() - started > longest:
            job.cancelled.set()
        assert time.monotonic() - started < 60, (job.model, job.events)
    return job.events[-1]


def drawn(operation, ask, most: int = 6, mode: GenerationMode = GenerationMode.POSITIVE) -> None:
    """Calls `ask` with requests that an operation allows, or does not."""

    @settings(EACH, max_examples=most)
    @given(operation.as_strategy(generation_mode=mode))
    def each(case) -> None:
        ask(case)

    each()


def test_answers_are_as_the_schema_says(studio, subtests):
    client, jobs = studio
    started = client.post("/api/jobs/look", json={"model": "reader", "text": "The king spoke to the", "generate": 2})
    assert end(jobs.all[started.json()["id"]], 60)[0] == "done"
    (looked,) = client.get("/api/recordings").json()
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", client.app, headers=HEADERS)
    asked, ends = set(), set()

    def ask(case, mode: GenerationMode) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            known = {"recording": looked["id"], "model": "reader"}
            case.body |= {name: value for name, value in known.items() if name in case.body}
        if "key" in (case.path_parameters or {}) and "recordings" in case.path and mode is GenerationMode.POSITIVE:
            case.path_parameters["key"] = looked["id"]
        response = case.call(headers=HEADERS, base_url=f"http://{HOST}")
        # What is allowed may be refused for what it refers to; and 413 is a refusal, though schemathesis does not
        # count it so.
        moot = [CHECKS.get_one("positive_data_acceptance")]
        moot += [CHECKS.get_one("negative_data_rejection")] * (response.status_code == 413)
        case.validate_response(response, excluded_checks=moot)
        asked.add((case.operation.label, mode))
        if "/jobs/" in case.path and case.method == "POST" and response.status_code == 200:
            name, what = end(jobs.all[response.json()["id"]])
            ends.add(name)
            assert name in ("done", "failed", "cancelled")
            assert not re.match(r"[A-Z]\w*(Error|Exception|Warning): ", what.get("why", "")), (case.body, what)

    operations = [one.ok() for one in schema.get_all_operations()]
    for operation, mode in itertools.product(operations, GenerationMode):
        with subtests.test(f"{operation.label}, {mode.value}"), suppress(Unsatisfiable):  # any text is a name
            drawn(operation, partial(ask, mode=mode), mode=mode)
    assert {label for label, mode in asked if mode is GenerationMode.POSITIVE} == {one.label for one in operations}
    assert {label for label, mode in asked if mode is GenerationMode.NEGATIVE} >= {
        one.label for one in operations if "/jobs/" in one.path and one.body
    }
    assert {"done", "failed"} <= ends


def test_every_address_asks_for_the_token_and_for_its_own_host(studio, subtests):
    client, jobs = studio
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", client.app, headers=HEADERS)
    before = len(jobs.all)

    def refused(case, headers: dict[str, str], status: int) -> None:
        response = case.call(headers=headers, base_url=f"http://{HOST}")
        assert response.status_code == status
        case.validate_response(response, excluded_checks=[CHECKS.get_one("positive_data_acceptance")])

    for operation in (one.ok() for one in schema.get_all_operations()):
        for headers, status in (({"host": HOST}, 403), ({**HEADERS, "host": "other.example"}, 421)):
            with subtests.test(operation.label):
                drawn(operation, partial(refused, headers=headers, status=status), most=1)
    assert len(jobs.all) == before
