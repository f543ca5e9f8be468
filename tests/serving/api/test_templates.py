"""A hostile chat template ends a request in one sentence, and the server answers the next one."""

import httpx2 as httpx
import pytest

from paceline.models.chat import ChatTemplate

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
HOSTILE = {
    "{{ 'x' * 3000000000 }}": "needs more than 1024 MB",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}"
    "{% endfor %}{% endfor %}": "2 seconds",
    "{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}": "writes more than",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_refused(source, address, lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "template", ChatTemplate(source))
    reply = httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=60)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.startswith("the chat template")
    assert HOSTILE[source] in message
    assert "\n" not in message
    monkeypatch.undo()
    assert httpx.post(f"{address}/v1/chat/completions", json=BODY).status_code == 200
