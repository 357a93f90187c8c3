"""What locust's users do: complete, chat, stream, and now and then send nonsense."""

from __future__ import annotations

import random

from locust import FastHttpUser, constant, task


class Client(FastHttpUser):
    wait_time = constant(0)

    def body(self, **more):
        text = " ".join(random.choices(["my", "fellow", "citizens", "of", "the", "union"], k=9))  # noqa: S311
        return {"model": "tiny", "max_tokens": random.randint(1, 20)} | {"prompt": text} | more  # noqa: S311

    @task(4)
    def complete(self):
        with self.client.post("/v1/completions", json=self.body(), catch_response=True) as answer:
            if answer.status_code == 200 and not answer.json()["usage"]["completion_tokens"]:
                answer.failure("no token came")

    @task(4)
    def stream(self):
        with self.client.post(
            "/v1/completions", json=self.body(stream=True), catch_response=True, name="streamed"
        ) as answer:
            if not answer.text.endswith("data: [DONE]\n\n"):
                answer.failure("the stream has no end")

    @task(1)
    def nonsense(self):
        with self.client.post(
            "/v1/completions", json=self.body(temperature=9), catch_response=True, name="refused"
        ) as answer:
            if answer.status_code == 400:
                answer.success()
            else:
                answer.failure(f"answered {answer.status_code}")
