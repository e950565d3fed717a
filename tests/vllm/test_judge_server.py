"""ppo.compare with a judge in vLLM's own OpenAI-compatible server: a tiny model, whose verdicts are noise."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from ppo.compare import main
from tests.helpers.tiny_run import as_argv, clean_environment

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CHOICE = {"max_tokens": 2, "temperature": 1.0, "seed": 3, "structured_outputs": {"choice": ["A", "B", "C"]}}


@pytest.fixture
def url(inputs, tmp_path):
    """Of a running server, which ends with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    words = {
        "model": inputs.policy, "served-model-name": "tiny", "dtype": "float32", "max-model-len": 512, "port": port,
        "max-num-seqs": 4, "host": "127.0.0.1", "chat-template": tmp_path / "template.jinja",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = tmp_path / "server.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=clean_environment() | settings, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        try:
            wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, 9)


def wait(health: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(health, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-3000:])


@pytest.mark.slow
def test_a_judge_in_vllm(inputs, url, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("{prompt} {answer_a} {answer_b}")
    flags = {
        "policies": [inputs.policy, inputs.other_policy], "data_path": inputs.prompts, "dtype": "fp32",
        "reward_model_path": inputs.reward, "maxlen_prompt": 80, "maxlen_res": 12, "output": tmp_path / "table.json",
        "judge_url": url, "judge_model": "tiny", "judge_prompt": tmp_path / "short.txt",
        "judge_arguments": json.dumps(CHOICE),
    }  # fmt: skip
    main(as_argv(flags))
    first = json.loads((tmp_path / "table.json").read_text())["judge"]
    assert first["requests"] == 6 and first["unreadable"] == 0 and first["pairs"][0]["prompts"] == 3
    assert first["prompt_tokens"] > 6 * 100 and first["completion_tokens"] >= 6
    assert first["pairs"][0]["agreement"].keys() == {"reward model score"}
    main(as_argv(flags))
    again = json.loads((tmp_path / "table.json").read_text())["judge"]
    assert again["requests"] == 0 and again["pairs"] == first["pairs"]
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the server's own message, by way of one line
        main(as_argv(flags | {"judge_model": "another"}))
    assert "no model another" in capsys.readouterr().err
